"""The kernels of sweeps that hold query rows: which source a plan compiles, with which constants, and what it takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lla_compile.backends.cuda.gram_kernels import Kernel
from lla_compile.backends.cuda.sweep_parts import print_sweeps
from lla_compile.backends.tiles import padded_width
from lla_compile.precision import weight_shift

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig
    from lla_compile.spec import LLASpec

_WARP_ROWS = 16
_FLOAT_BYTES, _INPUT_BYTES, _BARRIER_BYTES = 4, 2, 8
_OTHER_REGISTERS = 32  # numbers of rows, addresses
_AHEAD_REGISTERS = 4  # of a second product that is under way meanwhile
_WINDOW_REGISTERS = 8  # where rows' first keys are
_ADDRESS_REGISTERS = 8  # of two terms in shared memory
_TILE_BYTES = 72  # of struct QueryTile
_RESERVED_SHARED_MEMORY = 1024  # of a multiprocessor, for each block
_ALIGNMENT = 8  # of the structure that shared memory is
_ORDER_THREADS = 128  # the constant of tile_order.cu
_ROWS_OF_TWO_BLOCKS = 64  # a multiprocessor is to hold two blocks of so many rows


@dataclass(frozen=True)
class Path:
    """Kernels of one kind of matrix instructions.

    Attributes:
        name: of the kernel; its source is ``<name>.cu``.
        group_rows: rows that the warps of an instruction hold together; None for all of the block's.
        copy_warps: warps that hold no rows.
        barriers: of a stage, in shared memory; where warps copy, the block has one more.
        waiting_registers: of a thread with rows, for each vector that waits in memory.
        row_registers: that a thread with rows can have, by the rows of its block.
        block_q, block_k, stages: values worth trying, as few stages as there can be first.
        preference: (block_q, block_k), best first.
    """

    name: str
    group_rows: int | None
    copy_warps: int
    barriers: int
    waiting_registers: int
    row_registers: dict[int, int]
    block_q: tuple[int, ...]
    block_k: tuple[int, ...]
    stages: tuple[int, ...]
    preference: tuple[tuple[int, int], ...]


# Needs a tile whose weights are multiplied, the next one whose scores are, and one that is copied. Threads that copy
# leave registers to the others, see stream_wgmma.cuh; three groups of rows are too many for those that wide heads take,
# and of two blocks' 232 some are lost to what is live before registers move.
WGMMA = Path(
    "sweeps_wgmma", group_rows=64, copy_warps=4, barriers=2, waiting_registers=0,
    row_registers={64: 220, 128: 240, 192: 160}, block_q=(64, 128, 192), block_k=(32, 64, 96), stages=(3, 4, 5, 6, 8),
    preference=((192, 64), (128, 64), (64, 64), (64, 32)),
)  # fmt: skip
MMA = Path(
    "sweeps_mma", group_rows=None, copy_warps=0, barriers=0, waiting_registers=16,
    row_registers={64: 255, 128: 255}, block_q=(64, 128), block_k=(32, 64), stages=(2, 3, 4),
    preference=((64, 64), (64, 32)),
)  # fmt: skip
_WGMMA_CAPABILITY = "9.0"
_LEAST_WGMMA_WIDTH = 64  # of a panel of a tile, which products of rows take


def path(spec: LLASpec, device: DeviceInfo) -> Path:
    """The instructions that a device has for heads of this width."""
    wide = padded_width(spec.head_dim) >= _LEAST_WGMMA_WIDTH
    return WGMMA if wide and device.compute_capability == _WGMMA_CAPABILITY else MMA


def with_warps(config: KernelConfig, of: Path) -> KernelConfig:
    """The configuration with the warps that its rows take, and those that copy."""
    return replace(config, num_warps=config.block_q // _WARP_ROWS + of.copy_warps)


def registers(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> int:
    """What a thread that holds rows takes.

    In the fullest loop: sums, the scores of its products, weights, and the rounded vector or where it is; and what the
    updates of rows have under way of vectors that wait in memory.
    """
    if _has_means(spec):
        return _of_two_sums(spec, config, scores_ahead(spec, config, device))
    program, waiting = (source := print_sweeps(spec.op, spec.phase)).program, source.waiting
    width, width_v = padded_width(spec.head_dim), padded_width(spec.head_dim_v)
    scores = max(len(sweep.scores) for sweep in program.sweeps) * config.block_k // 2
    weights = spec.terms * config.block_k // 4
    window = _WINDOW_REGISTERS if spec.window_size is not None else 0
    rounded = 0 if not program.rounded else width // 4 if spec.terms == 1 else _ADDRESS_REGISTERS
    loop = max(width, width_v) // 2 + scores + weights + rounded + window + _OTHER_REGISTERS
    return loop + (len(waiting) - parked(spec, config, device)[0]) * path(spec, device).waiting_registers


def _of_two_sums(spec: LLASpec, config: KernelConfig, ahead: int) -> int:
    """Registers of a loop with two sums: beside them are the scores of so many products that run ahead and the weights
    of those that have not ended, and at other times both scores."""
    tiles = padded_width(spec.head_dim_v) + (1 + ahead) * config.block_k // 2
    return tiles + _OTHER_REGISTERS + (ahead - 1) * _AHEAD_REGISTERS


def scores_ahead(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> int:
    """How many of the two products of scores run while those of the tile before are under way, see
    mean_stream_wgmma.cuh: both where there are registers for it. A warp's own products do not run ahead at all."""
    of = path(spec, device)
    return 2 if of is WGMMA and _of_two_sums(spec, config, 2) <= of.row_registers[config.block_q] else 1


def _has_means(spec: LLASpec) -> bool:
    """Whether scores are relative to running means: such a list is one sweep with two sums."""
    return any(sweep.means() for sweep in print_sweeps(spec.op, spec.phase).program.sweeps)


def blocks_per_sm(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> int:
    """Blocks that a multiprocessor is to hold at once: what registers and shared memory are shared by."""
    fits = shared_memory(spec, config, device) <= _share_of_two(device)
    return 2 if config.block_q == _ROWS_OF_TWO_BLOCKS and fits else 1


def parked(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> tuple[int, int]:
    """How many of the vectors, and then of the numbers of rows, that wait between sweeps find room in shared memory;
    other vectors wait in the L2 cache, other numbers in registers. Between launches both are in memory."""
    if config.schedule == "split":
        return 0, 0
    source = print_sweeps(spec.op, spec.phase)
    two = blocks_per_sm(spec, config, device) == 2
    room = _share_of_two(device) if two else device.shared_memory_per_block

    def most(count: int, vectors: int | None = None) -> int:
        sizes = ((n, (n, 0) if vectors is None else (vectors, n)) for n in range(count, 0, -1))
        return next((n for n, waiting in sizes if shared_memory(spec, config, device, *waiting) <= room), 0)

    vectors = most(len(source.waiting))
    return vectors, most(len(source.waiting_rows), vectors)


def _share_of_two(device: DeviceInfo) -> int:
    return min(device.shared_memory_per_block, device.shared_memory_per_sm // 2 - _RESERVED_SHARED_MEMORY)


def shared_memory(
    spec: LLASpec, config: KernelConfig, device: DeviceInfo, parked_vectors: int = 0, parked_rows: int = 0
) -> int:
    """Bytes of struct Shared in stream_wgmma.cuh or stream_mma.cuh."""
    width, width_v = padded_width(spec.head_dim), padded_width(spec.head_dim_v)
    kernel = path(spec, device)
    stages = config.num_stages * config.block_k * max(width, width_v) * _INPUT_BYTES
    barriers = (config.num_stages * kernel.barriers + bool(kernel.copy_warps)) * _BARRIER_BYTES
    inputs = len(print_sweeps(spec.op, spec.phase).program.row_inputs)
    operands = (inputs if spec.terms == 1 else inputs + spec.terms) * _INPUT_BYTES
    rows = config.block_q * (width * (operands + parked_vectors * _FLOAT_BYTES) + max(1, parked_rows) * _FLOAT_BYTES)
    flags = 2 * config.block_q // _WARP_ROWS * 4
    return -(-(stages + barriers + rows + flags + _TILE_BYTES) // _ALIGNMENT) * _ALIGNMENT


def max_tiles(spec: LLASpec, config: KernelConfig) -> int:
    """Query tiles of a head; of packed sequences the most that there can be."""
    if spec.num_sequences is None:
        return -(-spec.seqlen_q // config.block_q)
    return spec.seqlen_q // config.block_q + spec.num_sequences


def launches(spec: LLASpec, config: KernelConfig, device: DeviceInfo, turns: int = 1) -> tuple[Kernel, ...]:
    """What a call starts: the kernels of the sweeps, after the one that orders the tiles of packed sequences.

    A kernel that does one turn of loops is there ``turns`` times.
    """
    parts = print_sweeps(spec.op, spec.phase, config.schedule).parts
    own = kernels(spec, config, device)
    sweeps = tuple(kernel for part, kernel in zip(parts, own) for _ in range(turns if part.repeats else 1))
    if spec.num_sequences is None:
        return sweeps
    defines = {name: own[0].defines[name] for name in ("BLOCK_Q", "CAUSAL")}
    blocks = -(-max_tiles(spec, config) // _ORDER_THREADS)
    return Kernel("tile_order", "tile_order.cu", (blocks, 1), _ORDER_THREADS, 0, defines, own[0].printed), *sweeps


def row_groups(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> int:
    """Groups of rows that stream together, of all blocks."""
    blocks = max_tiles(spec, config) * spec.batch * spec.num_heads
    return blocks * config.block_q // (path(spec, device).group_rows or config.block_q)


def kernels(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> tuple[Kernel, ...]:
    """The kernels of a plan's sweeps, one for each part."""
    of = path(spec, device)
    vectors, rows = parked(spec, config, device)
    defines = {
        "HEAD_DIM": spec.head_dim, "HEAD_DIM_V": spec.head_dim_v, "BLOCK_D": padded_width(spec.head_dim),
        "BLOCK_DV": padded_width(spec.head_dim_v), "BFLOAT16": int(spec.dtype == "bfloat16"),
        "BLOCK_Q": config.block_q, "BLOCK_K": config.block_k, "STAGES": config.num_stages, "PAGE_SIZE": 0,
        "GROUP_ROWS": of.group_rows or config.block_q, "CAUSAL": int(spec.is_causal),
        "WINDOWED": int(spec.window_size is not None), "PACKED": int(spec.num_sequences is not None),
        "TERMS": spec.terms, "WEIGHT_SHIFT": weight_shift(spec.dtype), "PARKED": vectors, "PARKED_ROWS": rows,
        "BLOCKS": blocks_per_sm(spec, config, device),
    }  # fmt: skip
    if _has_means(spec):
        defines |= {"WGMMA": int(of is WGMMA), "SCORES_AHEAD": scores_ahead(spec, config, device)}
    return tuple(
        Kernel(
            of.name, f"{of.name}.cu", (max_tiles(spec, config) * spec.batch * spec.num_heads, 1), 32 * config.num_warps,
            shared_memory(spec, config, device, vectors, rows), {name: str(value) for name, value in defines.items()},
            part.headers,
        )
        for part in print_sweeps(spec.op, spec.phase, config.schedule).parts
    )  # fmt: skip
