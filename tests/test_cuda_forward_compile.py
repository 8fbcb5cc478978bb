"""The CUDA kernels of the forward pass compiled for GPUs that are not here: what the machine code tells."""

import importlib.util
from dataclasses import dataclass, replace

import pytest
from compiled import NEEDS_NVRTC, code_of, lost_operands, shared_cubins

from lla_compile import backends
from lla_compile.backends.cuda import compiler, sweep_kernels
from lla_compile.devices import DeviceInfo, known_devices, resolve
from lla_compile.plans import KernelConfig
from lla_compile.prediction.cubin import Cubin
from lla_compile.spec import LLASpec

NEEDS_CUOBJDUMP = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton brings cuobjdump")
BACKEND = backends.get("cuda")
GPUS = [device for device in known_devices() if not device.is_cpu]


@dataclass(frozen=True)
class Case:
    """The heuristic default of a device, or tiles of (queries, keys) in so many stages."""

    gpu: str
    head_dim: int
    precision: str = "fast"
    tile: tuple[int, int, int] | None = None
    dtype: str = "bfloat16"
    window_size: int | None = None
    head_dim_v: int | None = None
    num_sequences: int | None = None
    op: str = "lla"
    schedule: str = "fused"

    def __str__(self) -> str:
        parts = (
            self.op, self.gpu, self.head_dim, self.head_dim_v, self.precision, self.tile, self.dtype, self.window_size,
            self.num_sequences, self.schedule,
        )  # fmt: skip
        return "-".join(str(part) for part in parts if part)

    @property
    def device(self) -> DeviceInfo:
        return resolve(self.gpu)

    @property
    def spec(self) -> LLASpec:
        spec = LLASpec.self_attention(
            self.dtype, self.head_dim, 4096, 32, op=self.op, precision=self.precision, window_size=self.window_size
        )
        return replace(spec, head_dim_v=self.head_dim_v or self.head_dim, num_sequences=self.num_sequences)

    @property
    def config(self) -> KernelConfig:
        default = replace(BACKEND.default_config(self.spec, self.device), schedule=self.schedule)
        if self.tile is None:
            return default
        block_q, block_k, num_stages = self.tile
        config = replace(default, block_q=block_q, block_k=block_k, num_stages=num_stages)
        config = sweep_kernels.with_warps(config, sweep_kernels.path(self.spec, self.device))
        assert BACKEND.infeasible(self.spec, config, self.device) is None
        return config

    @property
    def kernel(self):
        """The one that takes most registers: in `split` the turn of the loops."""
        return sweep_kernels.kernels(self.spec, self.config, self.device)[self.schedule == "split"]

    @property
    def loops(self) -> int:
        """Over keys: one a sweep, and in a tier of two terms one more for turns in one term."""
        if not self.spec.solves:
            return 1
        return (1 if self.schedule == "split" else 3) + (self.precision == "accurate")


CASES = [
    Case("h200", 128),
    Case("h200", 128, tile=(128, 64, 4), dtype="float16", window_size=512),
    Case("h200", 128, tile=(64, 64, 3)),
    Case("h200", 128, num_sequences=20),
    Case("h200", 128, "accurate"),
    Case("h200", 128, "accurate", tile=(128, 64, 4), head_dim_v=40),
    Case("h200", 64),
    Case("h200", 64, tile=(192, 64, 4)),
    Case("h200", 64, window_size=512),
    Case("h200", 64, "accurate"),
    Case("h200", 16, "accurate"),
    Case("a100", 128),
    Case("a100", 128, "accurate", num_sequences=20),
    Case("a100", 64, tile=(128, 64, 3), dtype="float16"),
    Case("a100", 64, "accurate"),
    Case("l4", 128),
    Case("l4", 64, "accurate"),
    Case("l4", 32, head_dim_v=8),
    Case("b200", 128, "accurate"),
    Case("rtx5090", 128),
    Case("rtx5090", 128, "accurate"),
    Case("rtx5090", 40),
    Case("h200", 64, op="parallax"),
    Case("h200", 64, tile=(128, 64, 4), op="parallax"),
    Case("h200", 128, op="parallax"),
    Case("h200", 128, tile=(64, 32, 3), dtype="float16", window_size=512, op="parallax"),
    Case("a100", 128, op="parallax"),
    Case("l4", 128, op="parallax"),
    Case("b200", 128, op="parallax"),
    Case("rtx5090", 128, op="parallax"),
    Case("h200", 128, op="softmax"),
    Case("h200", 128, schedule="split"),
    Case("h200", 128, "accurate", schedule="split"),
    Case("h200", 64, schedule="split"),
    Case("h200", 64, "accurate", schedule="split"),
    Case("a100", 64, schedule="split"),
]
# Waits for products in a loop: for each score, for the sums, and where maxima move for the sums at once.
WAITS = {"lla": 3, "parallax": 4, "softmax": 2}
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="module")
def compiled():
    """A function from case to cubin."""
    known = {}

    def compile_case(case: Case) -> Cubin:
        if case not in known:
            kernel = case.kernel
            defines = kernel.defines | {"ALIGNED": "1"}
            binary = compiler.compile_kernel(kernel.source, defines, case.device.compute_capability, kernel.printed)
            known[case] = Cubin(kernel.name, kernel.threads // 32, kernel.shared, binary)
        return known[case]

    return compile_case


@pytest.fixture(scope="module", autouse=True)
def cache():
    with shared_cubins():
        yield


@NEEDS_NVRTC
@NEEDS_CUOBJDUMP
@EVERY_CASE
def test_registers_and_spills(case, compiled):
    """As many blocks as are meant to fit on a multiprocessor, and nothing lives in local memory."""
    kernel, cubin, device = case.kernel, compiled(case), case.device
    assert cubin.stack == 0
    blocks = int(kernel.defines["BLOCKS"])
    assert blocks * cubin.registers * kernel.threads <= device.registers_per_sm
    assert kernel.shared <= device.shared_memory_per_block
    assert blocks * (kernel.shared + 1024) <= device.shared_memory_per_sm


@NEEDS_NVRTC
@NEEDS_CUOBJDUMP
@EVERY_CASE
def test_tensor_cores(case, compiled):
    """Every pass multiplies in its loop; tiles are copied asynchronously, and no wgmma is waited for by itself."""
    cubin = compiled(case)
    wgmma = sweep_kernels.path(case.spec, case.device) is sweep_kernels.WGMMA
    products = "HGMMA" if wgmma else "HMMA"
    assert bool(cubin.count("HGMMA")) == wgmma and cubin.count("LDGSTS")
    loops = [loop for loop in cubin.loops if loop[products]]
    assert len(loops) == case.loops
    if wgmma:
        addresses = [address for address, name, _ in cubin.instructions if name.startswith("WARPGROUP.DEPBAR")]
        for loop in loops:
            assert sum(loop.start <= address <= loop.stop for address in addresses) <= WAITS[case.op]
            assert not lost_operands(code_of(cubin, loop))


@NEEDS_NVRTC
@NEEDS_CUOBJDUMP
@pytest.mark.parametrize("case", [Case("h200", 128, num_sequences=20), Case("l4", 64, num_sequences=20)], ids=str)
def test_packed_sequences_start_another_kernel_first(case):
    order, sweeps = sweep_kernels.launches(case.spec, case.config, case.device)
    tiles = 4096 // case.config.block_q + 20
    assert order.grid[0] * order.threads >= tiles and sweeps.grid[0] == 32 * tiles
    binary = compiler.compile_kernel(order.source, order.defines, case.device.compute_capability, order.printed)
    cubin = Cubin(order.name, order.threads // 32, order.shared, binary)
    assert cubin.stack == 0 and cubin.registers <= 64


@NEEDS_NVRTC
@NEEDS_CUOBJDUMP
def test_kernels_of_a_split_schedule():
    """Nothing of them lives in local memory; the turn of the loops is launched as often as they can turn."""
    case = Case("h200", 64, schedule="split")
    binaries = BACKEND.binaries(case.spec, case.config, case.device)
    assert [Cubin(*binary).stack for binary in binaries] == [0, 0, 0] and len(set(binaries)) == 3
    case = replace(case, num_sequences=20)
    stats, turn, output = sweep_kernels.kernels(case.spec, case.config, case.device)
    order, *launches = sweep_kernels.launches(case.spec, case.config, case.device, turns=5)
    assert order.name == "tile_order" and launches == [stats, *5 * [turn], output]
    hashes = {BACKEND.source_hash(case.spec, replace(case.config, schedule=name)) for name in ("fused", "split")}
    assert len(hashes) == 2


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.id)
@pytest.mark.parametrize("precision", ["fast", "accurate"])
@pytest.mark.parametrize("head_dim", [1, 16, 32, 40, 64, 96, 128])
@pytest.mark.parametrize("op", ["lla", "parallax", "softmax"])
def test_heuristic_default_and_alternatives_are_feasible(device, precision, head_dim, op):
    for head_dim_v in (head_dim, 5, 128):
        spec = replace(Case("h200", head_dim, precision, op=op).spec, head_dim_v=head_dim_v)
        configs = (BACKEND.default_config(spec, device), *BACKEND.alternatives(spec, device))
        assert len(set(configs)) == len(configs) > 1
        assert all(BACKEND.infeasible(spec, config, device) is None for config in configs)


@pytest.mark.parametrize("gpu, precision, knobs, part", [
    ("h200", "fast", dict(num_stages=20), "shared memory"),
    ("h200", "fast", dict(num_stages=2), "num_stages must be at least 3"),
    ("h200", "fast", dict(num_warps=8), "128 queries take 12 warps"),
    ("h200", "fast", dict(block_q=192, num_warps=16), "registers > 160"),
    ("h200", "fast", dict(block_k=48), "(32, 64, 96) keys, got 128 and 48"),
    ("h200", "fast", dict(schedule="gram"), "schedules fused and split, got gram"),
    ("a100", "fast", dict(num_warps=8), "64 queries take 4 warps"),
    ("a100", "fast", dict(num_stages=1), "num_stages must be at least 2"),
    ("l4", "accurate", dict(block_q=128, num_warps=8, num_stages=2), "shared memory"),
])  # fmt: skip
def test_infeasible_says_why(gpu, precision, knobs, part, op="lla"):
    case = Case(gpu, 128, precision, op=op)
    assert part in BACKEND.infeasible(case.spec, replace(case.config, **knobs), case.device)


@pytest.mark.parametrize("op", ["parallax", "softmax"])
def test_what_solves_nothing_has_one_launch(op):
    test_infeasible_says_why("h200", "fast", dict(schedule="split"), f"{op} solves nothing", op)
    assert BACKEND.search_space(Case("h200", 64, op=op).spec, resolve("h200"))["schedule"] == ("fused",)


def test_two_sums_leave_no_registers_for_three_groups_of_wide_heads():
    test_infeasible_says_why("h200", "fast", dict(block_q=192, num_warps=16), "registers > 160", "parallax")


@pytest.mark.parametrize("fields, part", [
    (dict(phase="backward"), "not of lla"),
    (dict(dtype="float32"), "no float32 kernel"),
    (dict(head_dim=129), "at most 128"),
    (dict(head_dim_v=129), "at most 128"),
])  # fmt: skip
def test_unsupported_says_why(fields, part):
    assert part in BACKEND.unsupported(replace(Case("h200", 64).spec, **fields), resolve("h200"))
