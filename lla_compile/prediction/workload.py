"""What a plan asks of a device: its launches, their blocks, and how often each of their loops turns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from lla_compile.backends.gram_parts import TWO_TERMS_UP_TO
from lla_compile.key import key_of
from lla_compile.lowering import lower
from lla_compile.masks import key_range
from lla_compile.plans import KernelConfig
from lla_compile.precision import split_tol
from lla_compile.spec import LLASpec
from lla_compile.sweeps import Loop, Stage, SweepList, sweep_of

# Times are predicted for the ridge that they are measured at, and for keys and queries that are standard normal.
RIDGE = 1.0

# Numbers of a state that a block of the merge holds, by backend.
_MERGED_TOGETHER = {"triton": 512, "cuda": 256}

_GROUP_ROWS = 64  # that warps of a CUDA kernel hold together

# Query rows of a block of the table that the CUDA backend's backward pass begins with, at 64 columns.
_TABLE_ROWS, _TABLE_COLUMNS = 32, 64


@dataclass(frozen=True)
class Pass:
    """One sweep of a kernel over the streamed side.

    Attributes:
        turns: of the loop over unmasked tiles, by block in launch order.
        masked: of the loops over tiles that need the mask.
        updates: epilogues of the sweep, by block.
        flops: tile products of one turn of a block.
        rows, columns: of the tile of row state that an epilogue goes through.
        solves: whether it is an iteration of the solver.
        terms: that computed operands of decoding are split in.
        streamed: keys of a tile, in decoding.
        stages: of the ring that tiles are copied to, if it is the kernel's own.
    """

    turns: np.ndarray
    masked: np.ndarray
    updates: np.ndarray
    flops: float
    rows: int
    columns: int
    solves: bool = False
    terms: int = 1
    streamed: int = 0
    stages: int = 0


@dataclass(frozen=True)
class Launch:
    """One launch, or several alike.

    Attributes:
        kernel: its place among the plan's kernels.
        copies: blocks for each entry of the passes' arrays.
        passes: the sweeps of a block; empty where the kernel does no sweep.
        count: launches alike.
        bytes: of intermediate results that it writes and reads.
        head_bytes: that a head streams, where heads run in groups whose streams the second-level cache holds.
        sharing: heads that stream the same.
    """

    kernel: int
    copies: int
    passes: tuple[Pass, ...] = ()
    count: float = 1.0
    bytes: float = 0.0
    head_bytes: int = 0
    sharing: int = 1


@dataclass(frozen=True)
class Workload:
    """All launches of a plan, and the bytes that have to come from device memory once."""

    launches: tuple[Launch, ...]
    bytes: float


def iterations(visible_keys: float, head_dim: int, ridge: float, tolerance: float) -> float:
    """Turns of CG until the rows of a tile that see so many standard normal keys have converged.

    Softmax weights of scaled scores, which have variance 1, leave 1/e of the keys to count. Their sample covariance has
    eigenvalues within (1 -+ sqrt(D / n))^2, and CG's residual falls by (sqrt(kappa) - 1) / (sqrt(kappa) + 1) a turn.
    Where fewer keys are visible than dimensions, the rank bounds the turns. The slowest row of a tile takes about one
    more than the mean.
    """
    spread = math.sqrt(head_dim / (max(visible_keys, head_dim) / math.e))
    kappa = ((1 + spread) ** 2 + ridge) / (max(1 - spread, 0.0) ** 2 + ridge)
    rate = (math.sqrt(kappa) + 1) / (math.sqrt(kappa) - 1)
    return 1.0 + math.log(2 / tolerance) / math.log(rate)


@lru_cache(maxsize=1024)
def workload(spec: LLASpec, config: KernelConfig) -> Workload:
    """The launches of a plan, in order.

    Raises:
        NotImplementedError: sequences are packed, so that the lengths are not known.
    """
    if spec.num_sequences is not None:
        raise NotImplementedError("times of packed sequences are not predicted: their lengths are not known")
    if spec.phase == "decode":
        return _decoding(spec, config)
    program = lower(spec.op, spec.phase)
    program = program.wanting(program.ordinary)
    if config.schedule == "split" and not spec.solves:
        program = program.one_sum_a_sweep()
    launches = _before(spec, config)
    for kernel, stages in enumerate(_kernels(program, spec, config), start=len(launches)):
        streamed = _streamed_by_heads(sweep_of(stages[0]).holds, spec, config)
        launches += (replace(x, **streamed) for x in _launches(kernel, stages, program, spec, config))
    return Workload(tuple(launches), _bytes(spec, program))


def _streamed_by_heads(holds: str, spec: LLASpec, config: KernelConfig) -> dict[str, int]:
    """What a head streams past the side that blocks hold, and how many heads stream the same.

    Triton's kernels run heads in groups too; its constants are of a model that takes all heads at once.
    """
    if config.backend != "cuda":
        return {}
    item = 4 if spec.dtype == "float32" else 2
    if holds == "rows":
        keys = spec.seqlen_k * (spec.head_dim + spec.head_dim_v) * item
        return {"head_bytes": keys, "sharing": spec.group_size}
    rows = spec.seqlen_q * (2 * spec.head_dim + spec.head_dim_v) * item
    return {"head_bytes": rows * spec.group_size}


def _before(spec: LLASpec, config: KernelConfig) -> list[Launch]:
    """What a plan launches before its sweeps: the CUDA backend's backward pass makes a table of the rows' numbers."""
    if config.backend != "cuda" or spec.phase != "backward":
        return []
    rows = _TABLE_ROWS * _TABLE_COLUMNS // max(spec.head_dim, spec.head_dim_v, _TABLE_COLUMNS)
    return [Launch(0, -(-spec.batch * spec.num_heads * spec.seqlen_q // rows))]


def _kernels(program: SweepList, spec: LLASpec, config: KernelConfig) -> list[tuple[Stage, ...]]:
    """The stages of each kernel.

    In `fused` all that hold rows share one, the others have their own. In `split` each has its own, but those that turn
    share one in CUDA.
    """
    if config.schedule == "split":
        kernels = [(stage,) for stage in program.stages]
        loops = tuple(stage for stage in program.stages if isinstance(stage, Loop))
        if config.backend != "cuda" or not loops:
            return kernels
        first = program.stages.index(loops[0])
        return [*kernels[:first], loops, *kernels[first + len(loops) :]]
    rows = tuple(s for s in program.stages if sweep_of(s).holds == "rows" and not _is_left_out(s, program, spec))
    keys = [(stage,) for stage in program.stages if sweep_of(stage).holds == "keys"]
    return [rows, *keys] if rows else keys


def _is_left_out(stage: Stage, program: SweepList, spec: LLASpec) -> bool:
    """Whether a loop never turns: the coarse one does all where operands are one term anyway."""
    one_term = spec.terms == 1
    return isinstance(stage, Loop) and not stage.coarse and program.refines and one_term


def _launches(
    kernel: int, stages: tuple[Stage, ...], program: SweepList, spec: LLASpec, config: KernelConfig
) -> list[Launch]:
    if sweep_of(stages[0]).holds == "keys":
        own = config.holding_keys
        turns, masked = _query_tiles(spec, own.block_q, own.block_k)
        copies = spec.batch * spec.num_kv_heads
        flops = _flops(program, stages[0], spec, own)
        width = spec.head_dim + spec.head_dim_v
        sums = Pass(turns, masked, np.ones(len(turns)), flops, own.block_k, width, stages=_stages(own))
        return [Launch(kernel, copies, (sums,))]
    turns, masked, seen = _key_tiles(spec, config)
    loops = _turns_of_loops(program, spec, seen) if spec.solves else {}
    copies = spec.batch * spec.num_heads
    if config.schedule == "split" and isinstance(stages[0], Loop):
        own = [stage for stage in stages if not _is_left_out(stage, program, spec)]
        return _split_loops(kernel, own, loops, copies, turns, masked, program, spec, config) if own else []
    passes = []
    for stage in stages:
        times = loops[stage.coarse] if isinstance(stage, Loop) else np.ones(len(turns))
        passes.append(_rows_pass(stage, turns, masked, times, program, spec, config))
    return [Launch(kernel, copies, tuple(passes))]


def _rows_pass(stage, turns, masked, times, program: SweepList, spec: LLASpec, config: KernelConfig) -> Pass:
    """A sweep that holds rows, done so often by each block."""
    return Pass(
        turns * times, masked * times, times, _flops(program, stage, spec, config), config.block_q, spec.head_dim,
        solves=isinstance(stage, Loop), stages=_stages(config),
    )  # fmt: skip


def _stages(config: KernelConfig) -> int:
    """Of a kernel's own ring; how deep Triton's loops load ahead shows in their code."""
    return (config.num_stages or 0) if config.backend == "cuda" else 0


def _split_loops(kernel, stages, loops, copies, turns, masked, program, spec, config) -> list[Launch]:
    """A launch for each iteration up to the cap, of the loop that a block is in: those that have converged return at
    once."""
    through = np.cumsum([loops[stage.coarse] for stage in stages], axis=0)  # with each of the loops
    needed = min(math.ceil(through[-1].max()), config.cg_max_iters)

    def launch(turn: int, count: float) -> Launch:
        active = np.diff(np.clip(through - turn, 0.0, 1.0), axis=0, prepend=0.0)
        passes = (_rows_pass(stage, turns, masked, x, program, spec, config) for stage, x in zip(stages, active))
        return Launch(kernel, copies, tuple(passes), count)

    idle = config.cg_max_iters - needed
    return [*(launch(turn, 1) for turn in range(needed)), *([launch(needed, idle)] if idle else [])]


def _turns_of_loops(program: SweepList, spec: LLASpec, seen: np.ndarray) -> dict[bool, np.ndarray]:
    """Turns of the loop that splits operands and of the coarse one (by ``coarse``), for tiles that see so many keys."""
    total = np.array([iterations(keys, spec.head_dim, RIDGE, spec.cg_tol) for keys in seen])
    if not program.refines:
        return {True: total, False: total}
    tolerance = split_tol(spec.dtype, spec.precision)
    if not tolerance:
        return {True: total, False: np.zeros(len(total))}
    fine = total * math.log(2 / tolerance) / math.log(2 / spec.cg_tol)
    # The coarse solve starts anew: its first turn gains little.
    return {True: total - fine + 1, False: fine}


@lru_cache(maxsize=256)
def _key_tiles_of(
    seqlen_q: int, seqlen_k: int, causal: bool, window: int | None, block_q: int, block_k: int, first_rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For the query tiles in launch order: unmasked and masked tiles of keys, and keys that one of so many first rows
    sees on average."""
    starts = list(range(0, seqlen_q, block_q))
    if causal:  # the first tile, then the longest
        starts = starts[:1] + starts[:0:-1]
    counts = []
    for start in starts:
        stop = min(start + block_q, seqlen_q)
        seen = key_range(start, stop, seqlen_q, seqlen_k, causal, window)
        first = -(-seen.full_start // block_k) * block_k
        last = max(seen.full_stop // block_k * block_k, first)
        masked = -(-(seen.stop - last) // block_k) + max(first - seen.start // block_k * block_k, 0) // block_k
        seen = key_range(start, min(start + first_rows, stop), seqlen_q, seqlen_k, causal, window)
        by_some = seen.full_start - seen.start + seen.stop - seen.full_stop
        by_each = seen.full_stop - seen.full_start + by_some / 2
        counts.append(((last - first) // block_k, max(masked, 0), by_each))
    return tuple(np.array(column, dtype=float) for column in zip(*counts))


def _key_tiles(spec: LLASpec, config: KernelConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # A block takes the turns of its slowest rows: of causal ones the first, of those that converge together in CUDA.
    first_rows = min(config.block_q, _GROUP_ROWS) if config.backend == "cuda" else config.block_q
    sizes = spec.seqlen_q, spec.seqlen_k, spec.is_causal, spec.window_size
    return _key_tiles_of(*sizes, config.block_q, config.block_k, first_rows)


def _query_tiles(spec: LLASpec, block_q: int, block_k: int) -> tuple[np.ndarray, np.ndarray]:
    """For the key tiles in launch order: unmasked and masked tiles of queries, over all heads of a group.

    Key j is seen by the queries from j - (M - N) on, so that the tiles of queries are those of keys seen backwards.
    """
    turns, masked, _ = _key_tiles_of(
        spec.seqlen_k, spec.seqlen_q, spec.is_causal, spec.window_size, block_k, block_q, block_k
    )  # fmt: skip
    if spec.is_causal:  # mirrored, the last keys are the first rows; keys are launched first to last, longest first
        turns, masked = (np.concatenate((x[1:], x[:1])) for x in (turns, masked))
    return turns * spec.group_size, masked * spec.group_size


def _flops(program: SweepList, stage: Stage, spec: LLASpec, config: KernelConfig) -> float:
    """Of the tile products of one turn of a block, with the terms that computed operands are split in."""
    sweep = sweep_of(stage)
    terms = spec.terms
    if isinstance(stage, Loop) and stage.coarse:
        terms = 1

    def width(name: str) -> int:
        return spec.head_dim_v if name in program.value_wide else spec.head_dim

    columns = sum(width(s.col) * (terms if s.row in program.rounded else 1) for s in sweep.scores)
    columns += sum(width(a.operand) * terms for a in sweep.accumulators)
    return 2.0 * config.block_q * config.block_k * columns


def _bytes(spec: LLASpec, program: SweepList) -> float:
    """Inputs and outputs, once each."""
    item = 4 if spec.dtype == "float32" else 2
    rows = spec.batch * spec.num_heads * spec.seqlen_q * spec.head_dim
    keys = spec.batch * spec.num_kv_heads * spec.seqlen_k * (spec.head_dim + spec.head_dim_v)
    return item * (rows * (1 + len(program.row_inputs)) + keys * (1 + len(program.key_outputs) / 2))


def _decoding(spec: LLASpec, config: KernelConfig) -> Workload:
    """Every sequence of the cache is full."""
    item = 4 if spec.dtype == "float32" else 2
    keys = spec.visible_seqlen
    cache = item * spec.batch * spec.num_kv_heads * keys * (spec.head_dim + spec.head_dim_v)
    if config.schedule == "gram":
        return Workload(_gram(spec, config, keys), cache)
    rows = key_of(spec).group
    tiles = -(-rows // config.block_q)
    if not spec.solves:
        return Workload(_parts(spec, config, keys, tiles), cache)
    total = iterations(keys, spec.head_dim, RIDGE, spec.cg_tol)
    program = lower(spec.op, spec.phase)
    program = program.wanting(program.ordinary)
    loops = _turns_of_loops(program, spec, np.full(1, keys))
    turns = np.array([keys // config.block_k], dtype=float)
    masked = np.array([float(keys % config.block_k > 0)])
    passes = []
    for stage in program.stages:
        if _is_left_out(stage, program, spec):
            continue
        times = loops[stage.coarse] if isinstance(stage, Loop) else np.ones(1)
        flops = _flops(program, stage, spec, config)
        passes.append(Pass(turns * times, masked * times, times, flops, config.block_q, spec.head_dim))
    return Workload((Launch(0, spec.batch * spec.num_kv_heads * tiles, tuple(passes)),), cache * (3 + total))


def _parts(spec: LLASpec, config: KernelConfig, keys: int, tiles: int) -> tuple[Launch, ...]:
    """One pass over each part of the keys, and the merge of what several leave."""
    program = lower(spec.op, spec.phase)
    (sweep,) = program.sweeps
    part = -(-keys // config.num_splits)
    turns, masked = np.array([part // config.block_k], dtype=float), np.array([float(part % config.block_k > 0)])
    flops = _flops(program, sweep, spec, config)
    attend = Pass(turns, masked, np.ones(1), flops, config.block_q, spec.head_dim, stages=_stages(config))
    queries = spec.batch * spec.num_heads * spec.seqlen_q
    left = 4 * queries * config.num_splits * len(sweep.accumulators) * spec.head_dim_v * (config.num_splits > 1)
    launches = [Launch(0, spec.batch * spec.num_kv_heads * tiles * config.num_splits, (attend,), bytes=left)]
    return (*launches, Launch(1, queries, bytes=left)) if config.num_splits > 1 else tuple(launches)


def _gram(spec: LLASpec, config: KernelConfig, keys: int) -> tuple[Launch, ...]:
    """One pass of blocks that hold rows of the covariances, the merge of the parts, and the solve."""
    queries = spec.batch * spec.num_heads * spec.seqlen_q
    width, width_v = spec.head_dim, spec.head_dim_v
    blocks = -(-width // config.block_d)
    part = -(-keys // config.num_splits)
    # Triton's products in two terms are not told apart from those in one.
    two = config.backend == "cuda" and spec.terms == 2 and keys <= TWO_TERMS_UP_TO
    terms = 2 if two else 1
    flops = 2.0 * config.block_k * (terms * config.block_d * (width + width_v) + width)
    turns = np.array([part // config.block_k], dtype=float)
    masked = np.array([float(part % config.block_k > 0)])
    covariances = Pass(
        turns, masked, np.ones(1), flops, config.block_d, width + width_v, terms=terms, streamed=config.block_k,
        stages=_stages(config),
    )  # fmt: skip
    state = 4 * queries * (16 + 2 * width + width_v + width * (width + width_v))  # float32 numbers that a part leaves
    launches = [Launch(0, queries * config.num_splits * blocks, (covariances,), bytes=state * config.num_splits)]
    if config.num_splits > 1:
        tiles = -(-state // (4 * queries * _MERGED_TOGETHER[config.backend]))
        launches.append(Launch(1, queries * tiles, bytes=state * (config.num_splits + 1)))
    return (*launches, Launch(len(launches), queries, bytes=state))
