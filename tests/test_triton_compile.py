"""Kernels compiled for GPUs that are not here, and what the machine code tells: instructions, spills, shared memory."""

import importlib.util
import inspect
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace

import pytest
from cubin import Cubin, compile_cubins

from lla_compile import backends
from lla_compile.backends.triton import resources
from lla_compile.devices import DeviceInfo, known_devices, resolve
from lla_compile.plans import KernelConfig
from lla_compile.spec import LLASpec

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

BACKEND = backends.get("triton")
GPUS = [device for device in known_devices() if not device.is_cpu]
MATRIX_INSTRUCTION = {"8.0": "HMMA", "8.6": "HMMA", "8.9": "HMMA", "9.0": "HGMMA", "10.0": "UTCHMMA", "12.0": "HMMA"}


@dataclass(frozen=True)
class Case:
    """A kernel variant to compile: the heuristic default of the device, in one of the schedules."""

    gpu: str
    head_dim: int
    schedule: str = "fused"
    precision: str = "accurate"
    dtype: str = "bfloat16"
    head_dim_v: int | None = None
    options: tuple = ()
    variant: tuple = field(default=())

    def __str__(self) -> str:
        width = f"{self.head_dim}" if self.head_dim_v is None else f"{self.head_dim}x{self.head_dim_v}"
        names = [name for name, _ in (*self.options, *self.variant)]
        return "-".join([self.gpu, self.dtype, width, self.schedule, self.precision, *names])

    @property
    def device(self) -> DeviceInfo:
        return resolve(self.gpu)

    @property
    def spec(self) -> LLASpec:
        return make_spec(self.dtype, self.head_dim, self.head_dim_v, precision=self.precision, **dict(self.options))

    @property
    def config(self) -> KernelConfig:
        return replace(BACKEND.default_config(self.spec, self.device), schedule=self.schedule)


def make_spec(dtype: str, head_dim: int, head_dim_v: int | None = None, **fields) -> LLASpec:
    return LLASpec(dtype, head_dim, head_dim_v or head_dim, 2, 16, 16, 4096, 4096, **fields)


# The widths and types that matter most: here the hot loop must not touch local memory.
MAIN = [
    Case("h200", head_dim, schedule, precision)
    for head_dim in (64, 128)
    for schedule in ("fused", "split")
    for precision in ("fast", "accurate")
]
CASES = MAIN + [
    Case("h200", 64, dtype="float16"),
    Case("h200", 64, precision="fast", dtype="float32"),
    Case("h200", 40),
    Case("h200", 96, head_dim_v=40, precision="fast"),
    Case("h200", 256),
    Case("h200", 64, options=(("window_size", 500),)),
    Case("h200", 64, options=(("is_causal", False),)),
    Case("h200", 64, variant=(("ridge_tensor", True), ("scale_tensor", True), ("return_info", True))),
    Case("h200", 64, variant=(("aligned", False),)),
    Case("a100", 64, precision="fast"),
    Case("a100", 128),
    Case("a100", 64, schedule="split", dtype="float16"),
    Case("a100", 64, precision="fast", dtype="float32"),
    Case("b200", 64, precision="fast"),
    Case("b200", 64, schedule="split"),
    # 99 KiB of shared memory.
    Case("l4", 128),
    Case("rtx3090", 256, precision="fast"),
    Case("rtx5090", 64, schedule="split"),
]


@pytest.fixture
def case(request) -> Case:
    """A case that the Triton at hand can compile; the newest one compiles all."""
    case = request.param
    reason = BACKEND.infeasible(case.spec, case.config, case.device)
    if reason and reason.startswith("Triton"):
        pytest.skip(reason)
    return case


@pytest.fixture(scope="module")
def compiled(request):
    """A function from case to cubins. What the selected tests need is compiled ahead, in two processes."""
    parameters = (getattr(item, "callspec", None) for item in request.session.items)
    wanted = {p.params["case"] for p in parameters if p and isinstance(p.params.get("case"), Case)}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=use_the_compiler) as pool:
        cases = [case for case in CASES if case in wanted]
        futures = {c: pool.submit(compile_cubins, c.spec, c.config, c.device, **dict(c.variant)) for c in cases}
        yield lambda case: futures[case].result()
        for future in futures.values():
            future.cancel()


def use_the_compiler() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def key_loops(kernel: Cubin, instruction: str) -> list:
    """The loops over key tiles."""
    return [loop for loop in kernel.loops if loop[instruction]]


@pytest.mark.parametrize("case", CASES, ids=str, indirect=True)
def test_every_pass_over_the_keys_uses_the_tensor_cores(case, compiled):
    """Two loops a sweep, without and with mask, and a third for a window's edge; each loads its tiles and multiplies
    them by the instruction of the architecture, not by an older one."""
    instruction = MATRIX_INSTRUCTION[case.device.compute_capability]
    sweeps = {"fused": [3], "split": [1, 1, 1]}[case.schedule]
    loops_of_a_sweep = 3 if case.spec.window_size else 2
    for kernel, count in zip(compiled(case), sweeps, strict=True):
        loading = [loop for loop in kernel.loops if loop["LDG"] + loop["LDGSTS"]]
        assert len(loading) == count * loops_of_a_sweep
        assert all(loop[instruction] for loop in loading)
        assert kernel.count("HMMA") == (kernel.count(instruction) if instruction == "HMMA" else 0)


@pytest.mark.parametrize("case", MAIN, ids=str, indirect=True)
def test_hot_loops_keep_to_registers(case, compiled):
    """Row state may wait in local memory around the loop over unmasked key tiles, not inside it.

    The stats and output sweeps run once a call; there an address or two may be parked, as Triton 3.6 does.
    """
    hot = [
        (kernel.name, loop)
        for kernel in compiled(case)
        for loop in key_loops(kernel, "HGMMA")
        if loop["LDGSTS"]
    ]
    assert len(hot) == 3
    for sweep, (name, loop) in zip(("stats", "cg_step", "output"), hot, strict=True):
        allowed = 0 if sweep == "cg_step" else 2
        assert max(loop["LDL"], loop["STL"]) <= allowed, f"{sweep} in {name} at {loop.start:#x}: {loop.counts}"


@pytest.mark.parametrize("case", MAIN, ids=str, indirect=True)
def test_state_outside_the_loops_is_bounded(case, compiled):
    """What waits in local memory is row state: no more than the float32 vectors of a row tile take."""
    vectors = 7  # q, kbar, delta, residual, direction, probe, and an image or an accumulator
    limit = vectors * 4 * case.config.block_q * resources.padded_width(case.head_dim) // (32 * case.config.num_warps)
    assert all(kernel.stack <= limit for kernel in compiled(case))


@pytest.mark.parametrize("case", CASES, ids=str, indirect=True)
def test_shared_memory(case, compiled):
    """Within the device's limit, and what the resource model says: never under, and over by half at most. Unaligned
    rows cannot be copied asynchronously, so there is no pipeline whose buffers could be counted."""
    actual = max(kernel.shared for kernel in compiled(case))
    predicted = resources.shared_memory_bytes(*model_arguments(case))
    assert actual <= case.device.shared_memory_per_block
    assert actual <= predicted
    if ("aligned", False) not in case.variant:
        assert predicted <= 1.5 * actual


def model_arguments(case: Case) -> tuple:
    arguments = (case.spec, case.config, case.device)
    return arguments[: len(inspect.signature(resources.shared_memory_bytes).parameters)]


@pytest.mark.parametrize("case", MAIN, ids=str, indirect=True)
def test_a_warp_has_room_for_another(case, compiled):
    """Registers and shared memory let two blocks share a multiprocessor, so that one computes while the other waits."""
    device, threads = case.device, 32 * case.config.num_warps
    for kernel in compiled(case):
        assert 2 * (kernel.shared + 1024) <= device.shared_memory_per_sm
        assert 2 * threads * kernel.registers <= device.registers_per_sm


def test_a_compile_error_is_one_line():
    spec = make_spec("bfloat16", 64)
    wrong = replace(BACKEND.default_config(spec, resolve("h200")), block_q=48)  # not a power of two
    with pytest.raises(backends.CompileError) as error:
        BACKEND.precompile(spec, wrong, resolve("h200"))
    assert "\n" not in str(error.value) and "lla_forward_fused did not compile for sm_90" in str(error.value)


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.id)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_heuristic_default_is_feasible(device, dtype):
    for head_dim in (1, 16, 64, 96, 128, 192, 256):
        for precision in ("fast", "accurate"):
            spec = make_spec(dtype, head_dim, precision=precision)
            assert BACKEND.unsupported(spec, device) is None
            assert BACKEND.infeasible(spec, BACKEND.default_config(spec, device), device) is None


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.id)
def test_search_space_holds_feasible_points(device):
    spec = make_spec("bfloat16", 128)
    space = BACKEND.search_space(spec, device)
    default = BACKEND.default_config(spec, device)
    assert set(space) == set(default.as_dict()) - {"backend"}
    assert all(getattr(default, name) in values for name, values in space.items())
