"""The kernels of decoding compiled for GPUs that are not here, and what the machine code tells."""

import importlib.metadata
import importlib.util
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import pytest
from compiled import DecodeCase, cubin_of, decode_spec

from lla_compile import backends
from lla_compile.devices import known_devices
from lla_compile.plans import KernelConfig
from lla_compile.prediction.cubin import Cubin

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

BACKEND = backends.get("triton")
GPUS = [device for device in known_devices() if not device.is_cpu]
MATRIX_INSTRUCTION = {"8.0": "HMMA", "8.9": "HMMA", "9.0": "HGMMA", "10.0": "UTCHMMA"}
# Local-memory accesses in either loop over key tiles, by width, with either Triton.
SPILLS = {64: 0, 128: 32}
UNUSED = {"scale_ptr", "ridge_ptr", "iterations_ptr", "final_residual_ptr"}


@dataclass(frozen=True)
class Case(DecodeCase):
    """The heuristic default of a device."""

    @property
    def config(self) -> KernelConfig:
        return BACKEND.default_config(self.spec, self.device)


CASES = [
    Case("h200", 64),
    Case("h200", 128, page_size=16),
    Case("h200", 128, "float16"),
    Case("b200", 128, page_size=16),
    Case("a100", 64),
    Case("l4", 128, "float16", page_size=16),
]


EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str, indirect=True)


@pytest.fixture
def case(request) -> Case:
    """A case that the Triton at hand can compile; the newest one compiles all."""
    case = request.param
    reason = BACKEND.infeasible(case.spec, case.config, case.device)
    if reason and reason.startswith("Triton"):
        pytest.skip(reason)
    return case


def compile_case(case: Case) -> list[Cubin]:
    """As the launcher does it for calls with lengths."""
    from lla_compile.backends.triton.gram_launcher import compile_gram

    absent = UNUSED | (set() if case.page_size else {"block_table_ptr"})
    kernels = compile_gram(case.spec, case.config, case.device, absent=frozenset(absent))
    return [cubin_of(kernel) for kernel in kernels]


@pytest.fixture(scope="module")
def compiled(request):
    """A function from case to cubins. What the selected tests need is compiled ahead, in two processes."""
    parameters = (getattr(item, "callspec", None) for item in request.session.items)
    wanted = {p.params["case"] for p in parameters if p and isinstance(p.params.get("case"), Case)}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=use_the_compiler) as pool:
        futures = {case: pool.submit(compile_case, case) for case in CASES if case in wanted}
        yield lambda case: futures[case].result()
        for future in futures.values():
            future.cancel()


def use_the_compiler() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def key_loops(case: Case, kernel: Cubin) -> list:
    """The loops over key tiles."""
    return [loop for loop in kernel.loops if loop[MATRIX_INSTRUCTION[case.device.compute_capability]]]


@EVERY_CASE
def test_the_pass_uses_the_tensor_cores(case, compiled):
    """One loop weighs keys in two terms, the other in one; each copies its tiles asynchronously and multiplies them by
    the instruction of the architecture, not by an older one."""
    instruction = MATRIX_INSTRUCTION[case.device.compute_capability]
    gram_pass, *others = compiled(case)
    names = ["gram_merge", "gram_solve"] if case.config.num_splits > 1 else ["gram_solve"]
    assert gram_pass.name == "gram_pass" and [kernel.name for kernel in others] == names
    loops = key_loops(case, gram_pass)
    assert len(loops) == 2 and all(loop["LDGSTS"] for loop in loops)
    assert len({loop[instruction] for loop in loops}) == 2
    assert gram_pass.count("HMMA") == (gram_pass.count(instruction) if instruction == "HMMA" else 0)


@EVERY_CASE
def test_the_pass_keeps_to_registers(case, compiled):
    for loop in key_loops(case, compiled(case)[0]):
        assert max(loop["LDL"], loop["STL"]) <= SPILLS[case.head_dim], loop.counts


@EVERY_CASE
def test_merge_and_solve_keep_to_registers(case, compiled):
    assert all(kernel.stack == 0 for kernel in compiled(case)[1:])


@EVERY_CASE
def test_shared_memory(case, compiled):
    """Within the device's limit, and never more than the model of the configuration says: with a byte less it would
    refuse it."""
    actual = max(kernel.shared for kernel in compiled(case))
    assert actual <= case.device.shared_memory_per_block
    less = replace(case.device, shared_memory_per_block=actual - 1)
    assert "shared memory" in (BACKEND.infeasible(case.spec, case.config, less) or "")


def test_a_compile_error_is_one_line():
    case = CASES[0]
    wrong = replace(case.config, block_k=48)  # not a power of two
    with pytest.raises(backends.CompileError) as error:
        BACKEND.precompile(case.spec, wrong, case.device)
    assert "\n" not in str(error.value) and "gram_pass did not compile for sm_90" in str(error.value)


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.id)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", [1, 16, 32, 40, 64, 96, 128])
def test_heuristic_default_is_feasible(device, dtype, head_dim):
    for head_dim_v in (head_dim, 5, 128):
        for fields in (dict(), dict(page_size=16), dict(precision="fast"), dict(num_kv_heads=4, seqlen_q=16)):
            spec = decode_spec(dtype, head_dim, head_dim_v, **fields)
            reason = BACKEND.infeasible(spec, BACKEND.default_config(spec, device), device)
            assert reason is None or reason.startswith("Triton before")
            assert BACKEND.unsupported(spec, device) == (reason and f"no configuration fits: {reason}")
