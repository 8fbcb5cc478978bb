"""Kernels compiled for GPUs that are not here, and what the machine code tells: instructions, spills, shared memory."""

import importlib.util
import inspect
import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace

import pytest
from compiled import compile_cubins

from lla_compile import backends, precision
from lla_compile.backends.triton import resources
from lla_compile.devices import DeviceInfo, known_devices, resolve
from lla_compile.lowering import INFO, SAVED, lower
from lla_compile.plans import KernelConfig
from lla_compile.prediction.cubin import Cubin
from lla_compile.spec import LLASpec
from lla_compile.sweeps import Loop, sweep_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

PREFILL = ("forward", "backward")
BACKEND = backends.get("triton")
GPUS = [device for device in known_devices() if not device.is_cpu]
MATRIX_INSTRUCTION = {"8.0": "HMMA", "8.6": "HMMA", "8.9": "HMMA", "9.0": "HGMMA", "10.0": "UTCHMMA", "12.0": "HMMA"}

# Local-memory accesses in the loop over unmasked tiles, with either Triton. 3.9 parks more of grad_q than 3.6, and two
# addresses of the backward cg_step that splits operands, which is left after a few turns.
SPILLS = {
    "forward": {"cg_step": 0, "coarse_cg_step": 0},
    "backward": {"cg_step": 2, "coarse_cg_step": 0, "adjoint_stats": 8, "grad_q": 56, "grad_kv": 16},
}


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
    phase: str = "forward"

    def __str__(self) -> str:
        width = f"{self.head_dim}" if self.head_dim_v is None else f"{self.head_dim}x{self.head_dim_v}"
        names = [name for name, _ in (*self.options, *self.variant)]
        return "-".join([self.phase, self.gpu, self.dtype, width, self.schedule, self.precision, *names])

    @property
    def device(self) -> DeviceInfo:
        return resolve(self.gpu)

    @property
    def spec(self) -> LLASpec:
        options = dict(self.options, precision=self.precision, phase=self.phase)
        return make_spec(self.dtype, self.head_dim, self.head_dim_v, **options)

    @property
    def config(self) -> KernelConfig:
        return replace(BACKEND.default_config(self.spec, self.device), schedule=self.schedule)

    def launches(self, kernel: str) -> bool:
        """Whether a compiled kernel is launched: a split schedule leaves out the loop that a coarse one makes idle."""
        one_term = precision.split_terms(self.dtype, self.precision) == 1
        return not (one_term and kernel.endswith("_cg_step") and "coarse" not in kernel)

    @property
    def sweeps(self) -> list[list[str]]:
        """Names of the sweeps of each kernel that is launched, in order; without loops that a coarse one makes idle."""
        program = lower("lla", self.phase)
        program = program.wanting(program.ordinary)
        terms = precision.split_terms(self.dtype, self.precision)
        stages = [s for s in program.stages if not isinstance(s, Loop) or s.coarse or terms == 2]
        if self.schedule == "split":
            return [[sweep_of(stage).name] for stage in stages]
        rows = [sweep_of(s).name for s in stages if sweep_of(s).holds == "rows"]
        return [rows] + [[sweep_of(s).name] for s in stages if sweep_of(s).holds == "keys"]


def make_spec(dtype: str, head_dim: int, head_dim_v: int | None = None, **fields) -> LLASpec:
    sizes = dict(batch=2, num_heads=16, num_kv_heads=16, seqlen_q=4096, seqlen_k=4096)
    return LLASpec(dtype, head_dim, head_dim_v or head_dim, **sizes | fields)


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
    Case("h200", 64, variant=(("ridge_tensor", True), ("scale_tensor", True), ("wanted", ("out", *INFO, *SAVED)))),
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
BACKWARD = [
    Case("h200", 64, precision="fast", phase="backward"),
    Case("h200", 64, phase="backward"),
    Case("h200", 128, precision="fast", phase="backward"),
    Case("h200", 128, phase="backward"),
]
CASES += BACKWARD + [
    Case("h200", 64, precision="fast", phase="backward", options=(("num_kv_heads", 4), ("window_size", 500))),
    Case("h200", 64, precision="fast", phase="backward", options=(("batch", 1), ("num_sequences", 7))),
    Case("h200", 64, "split", "fast", phase="backward", options=(("is_causal", False),)),
    Case("a100", 64, precision="fast", dtype="float16", phase="backward"),
    Case("b200", 64, precision="fast", phase="backward"),
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
def test_every_pass_uses_the_tensor_cores(case, compiled):
    """A sweep has a loop without mask and one or two with, before and after it; each loads its tiles and multiplies
    them by the instruction of the architecture, not by an older one."""
    instruction = MATRIX_INSTRUCTION[case.device.compute_capability]
    kernels = [kernel for kernel in compiled(case) if case.launches(kernel.name)]
    for kernel, sweeps in zip(kernels, case.sweeps, strict=True):
        loading = [loop for loop in kernel.loops if loop["LDG"] + loop["LDGSTS"]]
        three = case.spec.window_size or (sweeps[0] == "grad_kv" and case.spec.is_causal)
        assert len(loading) == len(sweeps) * (3 if three else 2), kernel.name
        assert all(loop[instruction] for loop in loading)
        assert kernel.count("HMMA") == (kernel.count(instruction) if instruction == "HMMA" else 0)


@pytest.mark.parametrize("case", MAIN + BACKWARD, ids=str, indirect=True)
def test_hot_loops_keep_to_registers(case, compiled):
    """Row state may wait in local memory around the loop over unmasked tiles, not inside it: least of all in that of
    CG, which runs once an iteration. Sweeps that run once a call may park an address or two, as Triton 3.6 does."""
    kernels = [kernel for kernel in compiled(case) if case.launches(kernel.name)]
    for kernel, sweeps in zip(kernels, case.sweeps, strict=True):
        hot = [loop for loop in key_loops(kernel, "HGMMA") if loop["LDGSTS"]]
        for sweep, loop in zip(sweeps, hot, strict=True):
            allowed = SPILLS[case.phase].get(sweep, 2)
            assert max(loop["LDL"], loop["STL"]) <= allowed, f"{sweep} in {kernel.name}: {loop.counts}"


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
    for head_dim, tier, phase in itertools.product((1, 16, 64, 96, 128, 192, 256), ("fast", "accurate"), PREFILL):
        spec = make_spec(dtype, head_dim, precision=tier, phase=phase)
        reason = BACKEND.unsupported(spec, device)
        # Three terms of four wide float32 tiles are more than 99 KiB, however few rows they have.
        if (dtype, tier, phase) == ("float32", "accurate", "backward") and head_dim > 128 and reason:
            assert device.shared_memory_per_block < 100 << 10 and "shared memory" in reason
            continue
        assert reason is None
        assert BACKEND.infeasible(spec, BACKEND.default_config(spec, device), device) is None


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.id)
@pytest.mark.parametrize("phase", PREFILL)
def test_search_space_holds_feasible_points(device, phase):
    spec = make_spec("bfloat16", 128, phase=phase)
    space = BACKEND.search_space(spec, device)
    default = BACKEND.default_config(spec, device)
    assert set(space) == set(default.as_dict()) - {"backend"}
    assert all(getattr(default, name) in values for name, values in space.items())
