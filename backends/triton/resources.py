"""The hardware limits of a Triton configuration, stated once: the tuner prunes by them, the heuristic stays within."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Iterator

from lla_compile.backends.tiles import padded_width
from lla_compile.expr import Kind
from lla_compile.lowering import lower

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig
    from lla_compile.spec import LLASpec
    from lla_compile.sweeps import Sweep, SweepList

_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_MAX_REGISTERS = 255  # of a thread; what is left for addresses and row state beyond the tiles follows
_REGISTERS_BESIDE_TILES = 40
_MMA_ROWS = 16  # rows of query that one warp needs to own in a matrix instruction
_WGMMA_ROWS = 64  # of the least that compute capability 9 multiplies by wgmma; fewer go to the older instruction
_WIDEST_PAIR = 128  # columns of accumulators that a key tile can have two of
_BARRIER_BYTES = 256
_FUSED_ON_TCGEN05 = (3, 9)  # 3.6 fails in its tensor-memory layout pass; the versions between were not tried


def interpreting() -> bool:
    """Whether TRITON_INTERPRET asks Triton to run kernels on the CPU, where no limit of a GPU holds."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def one_sum_a_sweep(spec: LLASpec, config: KernelConfig) -> bool:
    """Whether every sum over a key tile has a launch of its own.

    So it is where heads are so wide that two accumulators do not fit in registers together; and in the schedule `split`
    of operators that solve nothing, whose rows are one sweep anyway.
    """
    if config.schedule == "split" and not spec.solves:
        return True
    return max(padded_width(spec.head_dim), padded_width(spec.head_dim_v)) > _WIDEST_PAIR


@dataclass(frozen=True)
class _Placement:
    """Where a generation of tensor cores wants the operands of a tile product.

    Attributes:
        computed_copies: terms of an operand that the kernel computes (direction, probe) in shared memory; 0 keeps it
            in registers.
        loaded_copies: the same of one that it loads.
        weights_in_shared: so do the weights, because warps exchange their columns.
        stages: streamed tiles in shared memory at a time.
        extra_bytes: what the instructions need beside the tiles.
    """

    computed_copies: int
    loaded_copies: int
    weights_in_shared: bool
    stages: int
    extra_bytes: int = 0


@dataclass(frozen=True)
class _Tiles:
    """The tiles that one sweep works with under a configuration, in elements of the input type unless named otherwise.

    Attributes:
        held_block, streamed_block: rows of the two sides' tiles.
        held: of the inputs that stay.
        streamed: of what one step of the stream brings.
        streamed_numbers: float32 numbers per row that it brings beside.
        computed, loaded: of one term of the row operands that are computed, and read from memory, before the stream.
        accumulators: float32 elements that are accumulated.
        scores: float32 elements of the scores, and of one more tile where weights of several products are alive.
        weights: of one weight.
        width: of the widest operand.
        rows: of the row operands that are inputs, on whichever side they are.
    """

    held_block: int
    streamed_block: int
    held: int
    streamed: int
    streamed_numbers: int
    computed: int
    loaded: int
    accumulators: int
    scores: int
    weights: int
    width: int
    rows: int


def _tiles(program: SweepList, sweep: Sweep, spec: LLASpec, config: KernelConfig) -> _Tiles:
    terms = spec.terms

    def width(name: str) -> int:
        return padded_width(spec.head_dim_v if name in program.value_wide else spec.head_dim)

    pairs = config.block_q * config.block_k
    row_operands = {score.row for score in sweep.scores} - set(program.row_inputs)
    sums = {accumulator.name for accumulator in sweep.accumulators}
    names = {x for score in sweep.scores for x in (score.row, score.col)} | {a.operand for a in sweep.accumulators}
    common = dict(weights=pairs, width=max(width(name) for name in names | sums))
    if sweep.holds == "keys":
        rows = names - set(program.col_inputs)
        numbers = [x for x in sweep.stream_reads() if program.kinds.get(x) is Kind.ROW]
        return _Tiles(
            held_block=config.block_k,
            streamed_block=config.block_q,
            held=config.block_k * sum(width(name) for name in program.col_inputs),
            streamed=config.block_q * sum(width(name) * (terms if name in program.rounded else 1) for name in rows),
            streamed_numbers=config.block_q * len(numbers),
            computed=0,
            loaded=0,
            accumulators=config.block_k * sum(map(width, sums)),
            scores=(len(sweep.scores) + 1) * pairs,
            rows=config.block_q * sum(map(width, rows)),
            **common,
        )
    given = row_operands & program.given.keys()
    return _Tiles(
        held_block=config.block_q,
        streamed_block=config.block_k,
        held=config.block_q * sum(width(name) for name in program.row_operands),
        streamed=config.block_k * sum(width(name) for name in names & set(program.col_inputs)),
        streamed_numbers=0,
        computed=config.block_q * sum(width(name) for name in row_operands - given),
        loaded=config.block_q * sum(width(name) for name in given),
        accumulators=config.block_q * sum(map(width, sums)),
        scores=len(sweep.scores) * pairs,
        rows=config.block_q * sum(width(name) for name in program.row_operands),
        **common,
    )


def _sweeps(spec: LLASpec, config: KernelConfig) -> Iterator[tuple[_Tiles, KernelConfig]]:
    """What every sweep of the spec works with."""
    program = lower(spec.op, spec.phase)
    if one_sum_a_sweep(spec, config):
        program = program.one_sum_a_sweep()
    for sweep in program.sweeps:
        own = config.holding_keys if sweep.holds == "keys" else config
        yield _tiles(program, sweep, spec, own), own


def _placement(spec: LLASpec, config: KernelConfig, tiles: _Tiles, device: DeviceInfo) -> _Placement:
    capability = float(device.compute_capability)
    stages = max(config.num_stages, 1)
    terms = spec.terms
    if (spec.dtype, spec.precision) == ("float32", "accurate"):
        terms = 3  # of a tf32x3 product
    split = config.schedule == "split"  # a split sweep loads its row operands instead of computing them
    if 9 <= capability < 10 and tiles.held_block >= _WGMMA_ROWS:  # four warps own 64 rows; more of them share rows
        crossed = config.num_warps > 4 and tiles.held_block < _MMA_ROWS * config.num_warps
        in_shared = crossed or split or spec.dtype == "float32"
        return _Placement(terms * in_shared, terms, crossed, stages)
    if is_tcgen05(device):  # operands come from shared memory; a split leaves one more copy behind
        copies = 2 * terms - 1
        return _Placement(copies, copies, tiles.loaded > 0, stages, _BARRIER_BYTES)
    # mma.sync: the tile in use is in registers, and wide products lay the warps along columns
    crossed = tiles.held_block < tiles.width or tiles.held_block < tiles.streamed_block
    return _Placement(terms * (crossed or split), terms, crossed, max(stages - 1, 1))


def is_tcgen05(device: DeviceInfo) -> bool:
    return 10 <= float(device.compute_capability) < 12


def refused_on_tcgen05() -> str | None:
    """Why kernels of several dependent products do not run on compute capability 10, or None."""
    if _triton_version() >= _FUSED_ON_TCGEN05:
        return None
    needed = ".".join(map(str, _FUSED_ON_TCGEN05))
    return f"Triton before {needed} does not compile this schedule's kernel for compute capability 10"


@lru_cache(maxsize=None)
def _triton_version() -> tuple[int, int]:
    major, minor = importlib.metadata.version("triton").split(".")[:2]
    return int(major), int(minor)


def shared_memory_bytes(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> int:
    """Shared memory of a block in the sweep that needs most: held and streamed tiles, row operands, weights."""
    return max(_shared(spec, own, tiles, device) for tiles, own in _sweeps(spec, config))


def _shared(spec: LLASpec, config: KernelConfig, tiles: _Tiles, device: DeviceInfo) -> int:
    placement, terms = _placement(spec, config, tiles, device), spec.terms
    if spec.dtype == "float32" and tiles.held_block < _MMA_ROWS * config.num_warps:
        terms += 1  # warps that share rows exchange weights once more to take them apart
    elements = tiles.held + placement.stages * tiles.streamed
    elements += placement.computed_copies * tiles.computed + placement.loaded_copies * tiles.loaded
    if placement.weights_in_shared:
        elements += terms * tiles.weights
    if (spec.dtype, spec.precision, spec.solves) == ("float32", "accurate", False):
        # Nothing is split by the kernel, so that tf32x3 products do it: a second term of row operands lies in memory,
        # and gradients of queries are taken apart through it.
        elements += tiles.rows
        if spec.phase == "backward" and tiles.held_block == config.block_q:
            elements += max(2 * tiles.weights, config.block_q * tiles.width)
    numbers = max(config.num_stages - 1, 0) * tiles.streamed_numbers
    return _ITEM_BYTES[spec.dtype] * elements + 4 * numbers + placement.extra_bytes


def registers_per_thread(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> int:
    """32-bit registers that the tiles of the fullest inner loop take: accumulators, scores and operands.

    Row state (probe, residual, direction) is not in it: it is idle during the loop, and the compiler moves it to
    local memory around the loop at little cost.
    """
    return max(_registers(spec, own, tiles, device) for tiles, own in _sweeps(spec, config))


def _registers(spec: LLASpec, config: KernelConfig, tiles: _Tiles, device: DeviceInfo) -> int:
    placement, terms = _placement(spec, config, tiles, device), spec.terms
    elements = terms * (tiles.weights if tiles.computed or tiles.loaded else 0)
    if not placement.computed_copies:
        elements += terms * max(tiles.computed, tiles.loaded)
    operands = elements * _ITEM_BYTES[spec.dtype] // 4
    return (tiles.accumulators + tiles.scores + operands) // (32 * config.num_warps) + _REGISTERS_BESIDE_TILES


def infeasible(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str | None:
    """The limit that ``config`` breaks on ``device``, in words, or None."""
    if interpreting():
        return None
    if is_tcgen05(device) and config.schedule == "fused" and (why := refused_on_tcgen05()):
        return why
    for tiles, own in _sweeps(spec, config):
        if why := _breaks(spec, own, tiles, device):
            return why
    return None


def infeasible_shared_rows(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str | None:
    """The same where warps may share the rows of a tile, and exchange weights and operands."""
    if interpreting():
        return None
    if is_tcgen05(device) and (why := refused_on_tcgen05()):
        return why
    return next(filter(None, (_exceeds(spec, own, tiles, device) for tiles, own in _sweeps(spec, config))), None)


def _breaks(spec: LLASpec, config: KernelConfig, tiles: _Tiles, device: DeviceInfo) -> str | None:
    """The limit that one sweep breaks."""
    # Two accumulators of the widest heads leave room for so few rows that warps have to share them.
    shared_rows = not spec.solves and tiles.width > _WIDEST_PAIR
    if not shared_rows and (why := _rows_missing(config, tiles)):
        return why
    return _exceeds(spec, config, tiles, device)


def _rows_missing(config: KernelConfig, tiles: _Tiles) -> str | None:
    """Why the held tile has too few rows for the warps, or None."""
    held, streamed = ("block_q", "block_k") if tiles.held_block == config.block_q else ("block_k", "block_q")
    shares = tiles.held_block < _MMA_ROWS * config.num_warps
    if shares and tiles.held_block < 64:
        return f"{held} {tiles.held_block} leaves {config.num_warps} warps without {_MMA_ROWS} rows each"
    if shares and config.num_warps > 4 and tiles.streamed_block < 64:
        return f"{config.num_warps} warps share {tiles.held_block} rows, which needs {streamed} >= 64"
    return None


def _exceeds(spec: LLASpec, config: KernelConfig, tiles: _Tiles, device: DeviceInfo) -> str | None:
    """The memory that one sweep has too little of, or None."""
    shared = _shared(spec, config, tiles, device)
    if shared > device.shared_memory_per_block:
        return f"shared memory {shared} B > {device.shared_memory_per_block} B of a block on {device.id}"
    registers = _registers(spec, config, tiles, device)
    if registers > _MAX_REGISTERS:
        return f"about {registers} registers a thread > {_MAX_REGISTERS}: the inner loop would spill"
    if config.num_warps * 32 * min(registers, _MAX_REGISTERS) > device.registers_per_sm:
        return f"registers of {config.num_warps} warps exceed the {device.registers_per_sm} of a multiprocessor"
    return None
