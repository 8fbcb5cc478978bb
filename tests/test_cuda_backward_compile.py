"""The CUDA kernels of the backward pass compiled for a GPU that is not here: what the machine code tells."""

import itertools
import re
from dataclasses import dataclass, replace

import pytest
from compiled import NEEDS_NVRTC, code_of, lost_operands
from test_cuda_forward_compile import NEEDS_CUOBJDUMP, cache  # noqa: F401

from lla_compile import backends
from lla_compile.backends import cuda
from lla_compile.backends.cuda import backward_kernels, compiler
from lla_compile.devices import resolve
from lla_compile.plans import KernelConfig
from lla_compile.prediction.cubin import Cubin
from lla_compile.spec import LLASpec
from lla_compile.tuning_db import device_file, shipped_dir, store

BACKEND, H200 = backends.get("cuda"), resolve("h200")
CLOCKS_PER_COLUMN = 0.5  # of 64 x 16 times 16 x columns, on the tensor cores of a multiprocessor


@dataclass(frozen=True)
class Case:
    """The heuristic default, or what a block holds, a tile that is streamed past it, and stages."""

    op: str
    head_dim: int
    tile: tuple[int, int, int] | None = None
    dtype: str = "bfloat16"
    window_size: int | None = None
    num_sequences: int | None = None

    def __str__(self) -> str:
        packed = "packed" if self.num_sequences else None
        return "-".join(str(x) for x in (self.op, self.head_dim, self.tile, self.dtype, self.window_size, packed) if x)

    @property
    def spec(self) -> LLASpec:
        return LLASpec.self_attention(
            self.dtype, self.head_dim, 4096, 32, op=self.op, phase="backward", window_size=self.window_size,
            num_sequences=self.num_sequences,
        )  # fmt: skip

    @property
    def config(self) -> KernelConfig:
        default = BACKEND.default_config(self.spec, H200)
        if self.tile is None:
            return default
        held, streamed, stages = self.tile
        keys = dict(kv_block_q=streamed, kv_block_k=held, kv_num_stages=stages)
        config = replace(default, block_q=held, block_k=streamed, num_stages=stages, **keys)
        assert BACKEND.infeasible(self.spec, config, H200) is None
        return config


CASES = [
    Case("parallax", 64),
    Case("parallax", 128),
    Case("parallax", 64, tile=(192, 32, 3), dtype="float16", window_size=512),
    Case("softmax", 64, tile=(64, 128, 2)),
    Case("parallax", 128, num_sequences=20),
]


@NEEDS_NVRTC
@NEEDS_CUOBJDUMP
@pytest.mark.parametrize("case", CASES, ids=str)
def test_machine_code(case):
    """Blocks fit on a multiprocessor, nothing lives in local memory, and no product is waited for by itself."""
    kernels = backward_kernels.kernels(case.spec, case.config, H200)
    binaries = BACKEND.binaries(case.spec, case.config, H200)
    order = ["backward_order"] if case.num_sequences else []
    assert [kernel.name for kernel in kernels] == [*order, "backward_rows", "grad_q", "grad_kv"]
    for kernel, binary in zip(kernels, binaries):
        cubin = Cubin(binary.name, binary.num_warps, binary.shared, binary.cubin)
        assert cubin.stack == 0
        if kernel.name in ("backward_order", "backward_rows"):
            assert cubin.registers <= 64
            continue
        blocks = int(kernel.defines["BLOCKS"])
        assert blocks * cubin.registers * kernel.threads <= H200.registers_per_sm
        assert blocks * (kernel.shared + 1024) <= H200.shared_memory_per_sm
        [loop] = [loop for loop in cubin.loops if loop["HGMMA"]]
        assert not loop["LDG"] and not loop["LDGSTS"]
        code = code_of(cubin, loop)
        assert not lost_operands(code)
        waits = [number for number, (name, _) in enumerate(code) if name.startswith("WARPGROUP.DEPBAR")]
        assert len(waits) == 3
        # Exponentials run while other scores are multiplied, and not behind them.
        assert not any(name.startswith("MUFU") for name, _ in code[waits[1] :])
        # A warp issues less than its tensor core takes, which another group's products can have meanwhile.
        shapes = (re.match(r"HGMMA\.64x(\d+)x16", name) for name, _ in code)
        clocks = sum(CLOCKS_PER_COLUMN * int(shape[1]) for shape in shapes if shape)
        assert len(code) - hidden_pairs(code[waits[0] : waits[1]]) <= clocks


def hidden_pairs(code: list[tuple[str, str]]) -> int:
    """Instructions of the branch that hides pairs, which most tiles do not take: what the first jump skips."""
    jump = next(number for number, (name, _) in enumerate(code) if name == "BRA")
    back = next(number for number, (name, _) in enumerate(code[jump + 1 :]) if name == "BRA")
    return back + 1


def test_lost_operands_are_found():
    product = ("HGMMA.64x64x16.F32.BF16", "R24, R148, gdesc[UR12], R24, gsb0")
    written = ("F2FP.BF16.F32.PACK_AB", "R149, R16, R15")
    assert lost_operands([product, written]) == ["HGMMA.64x64x16.F32.BF16 R24, R148, gdesc[UR12], R24, gsb0: R149"]
    assert not lost_operands([product, ("STS", "R149, R16")])
    assert not lost_operands([written, (product[0], product[1].replace("]", "].tnspB"))])


@pytest.mark.parametrize("op", ["parallax", "softmax"])
@pytest.mark.parametrize("head_dim", [1, 16, 40, 64, 96, 128])
def test_heuristic_default_and_alternatives_are_feasible(op, head_dim):
    for head_dim_v in (head_dim, 5, 128):
        for window_size in (None, 100):
            spec = replace(Case(op, head_dim, window_size=window_size).spec, head_dim_v=head_dim_v)
            configs = (BACKEND.default_config(spec, H200), *BACKEND.alternatives(spec, H200))
            assert len(set(configs)) == len(configs) > 1
            assert all(BACKEND.infeasible(spec, config, H200) is None for config in configs)
            assert BACKEND.unsupported_spec(spec, H200) is None
            space = BACKEND.search_space(spec, H200)
            assert all(getattr(config, knob) in values for config in configs for knob, values in space.items())


@pytest.mark.parametrize("seqlen", [1, 130, 384, 4097])
def test_streamed_tiles_lie_within_the_table_of_their_head(seqlen):
    case = Case("softmax", 64)
    spec = replace(case.spec, seqlen_q=seqlen)
    for rows in BACKEND.search_space(spec, H200)["kv_block_q"]:
        assert -(-seqlen // rows) * rows <= backward_kernels.table_rows(spec, replace(case.config, kv_block_q=rows))


@pytest.mark.parametrize("rows", [32, 64, 96, 128])
def test_streamed_tiles_of_packed_sequences_lie_one_behind_another_in_the_table(rows):
    case = Case("parallax", 64, num_sequences=3)
    config = replace(case.config, kv_block_q=rows)
    for lengths in itertools.product((0, 1, rows - 1, rows, rows + 1), repeat=3):
        spec, ends = replace(case.spec, seqlen_q=sum(lengths)), itertools.accumulate(lengths, initial=0)
        starts = [(end // rows + sequence) * rows for sequence, end in enumerate(ends)]  # as table_start_of has them
        assert starts[-1] == backward_kernels.table_rows(spec, config)
        for start, length, stop in zip(starts, lengths, starts[1:]):
            assert start + -(-length // rows) * rows <= stop


def test_packed_sequences_take_the_plans_of_batches():
    """What was measured fits, though a block knows more of itself."""
    entries = store.load(device_file(shipped_dir(), H200.id)).entries
    plans = [(x.spec(), x.config) for x in entries if (x.config.backend, x.key.phase) == ("cuda", "backward")]
    assert plans
    for spec, config in plans:
        assert BACKEND.infeasible(replace(spec, num_sequences=7), config, H200) is None


@pytest.mark.parametrize("knobs, part", [
    (dict(num_stages=20), "grad_q takes"),
    (dict(kv_num_stages=1), "grad_kv needs at least 2 stages"),
    (dict(num_warps=8), "warps follow from what a block holds, got 8"),
    (dict(kv_block_q=64), "grad_kv takes 256 registers > 240"),
    (dict(block_k=48), "grad_q holds one of (64, 128, 192) and streams tiles of (32, 64, 96, 128), got 128 and 48"),
    (dict(schedule="split"), "schedule fused"),
])  # fmt: skip
def test_infeasible_says_why(knobs, part):
    case = Case("parallax", 128)
    assert part in BACKEND.infeasible(case.spec, replace(case.config, **knobs), H200)


@pytest.mark.parametrize("gpu, fields, part", [
    ("h200", dict(op="lla"), "of operators that solve nothing, not of lla"),
    ("h200", dict(dtype="float32"), "no float32 kernel"),
    ("h200", dict(head_dim_v=129), "at most 128"),
    ("a100", dict(), "not 8.0, for which Triton has them"),
    ("b200", dict(), "not 10.0, for which Triton has them"),
])  # fmt: skip
def test_unsupported_says_why(gpu, fields, part):
    assert part in BACKEND.unsupported(replace(Case("parallax", 64).spec, **fields), resolve(gpu))


@pytest.mark.parametrize("name", ["stream_saved.cuh", "row_table.cuh", "row_reader.cuh", "ptx_backward.cuh"])
def test_the_hash_covers_what_is_compiled(name, monkeypatch):
    spec = Case("parallax", 64).spec
    config, headers = BACKEND.default_config(spec, H200), compiler.read_headers()
    before = BACKEND.source_hash(spec, config)
    monkeypatch.setattr(compiler, "read_headers", lambda: headers | {name: headers[name] + "// changed"})
    cuda._backward_source_hash.cache_clear()
    assert BACKEND.source_hash(spec, config) != before
    monkeypatch.undo()
    cuda._backward_source_hash.cache_clear()
    assert BACKEND.source_hash(spec, config) == before
