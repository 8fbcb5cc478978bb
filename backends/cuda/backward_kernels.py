"""The kernels of a backward pass that solves nothing: which sources a plan compiles, with which constants, and what
they take: one that makes a table of row numbers, then one for each sweep; before them one that orders the tiles of
packed sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lla_compile.backends.cuda.backward_source import BackwardSource, SweepSource, print_backward
from lla_compile.backends.cuda.gram_kernels import Kernel
from lla_compile.backends.tiles import padded_width
from lla_compile.precision import weight_shift

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig
    from lla_compile.spec import LLASpec

GROUP_ROWS = 64  # of the held side, that the warps of a matrix instruction hold together
# That a thread which holds something can have, by the groups of a block, see stream_saved.cuh.
REGISTERS = {1: 232, 2: 240, 3: 160}
_ROWS_OF_TABLE = 384  # the table has a multiple of them, and every size of a streamed tile divides it
_LEAST_WIDTH = 64  # of a panel of a tile
_FLOAT_BYTES, _INPUT_BYTES, _BARRIER_BYTES = 4, 2, 8
_BLOCK_BYTES, _PACKED_BLOCK_BYTES = 64, 80  # of struct HeldBlock
_ALIGNMENT = 16  # of struct Shared
_OTHER_REGISTERS = 24  # addresses, bounds of the stream, what an expression has under way
_WINDOW_REGISTERS = 8  # where a window begins
_ROWS_A_REGISTER = 8  # of those streamed, for what is read ahead of their numbers
_RESERVED_SHARED_MEMORY = 1024  # of a multiprocessor, for each block
_ROWS_THREADS = 256  # of the kernel that makes the table
_ORDER_THREADS = 128  # of the one that orders tiles


@dataclass(frozen=True)
class Shape:
    """A block of one sweep: how much of its side it holds, how much of the other one a stage has, and how many stages."""

    held: int
    streamed: int
    stages: int

    @property
    def groups(self) -> int:
        return self.held // GROUP_ROWS

    @property
    def threads(self) -> int:
        """Of the groups, and of the warps that copy."""
        return 2 * GROUP_ROWS * (self.groups + 1)


def shape_of(source: SweepSource, config: KernelConfig) -> Shape:
    """What the knobs of a configuration say of a sweep."""
    if source.sweep.holds == "keys":
        own = config.holding_keys
        return Shape(own.block_k, own.block_q, own.num_stages or 0)
    return Shape(config.block_q, config.block_k, config.num_stages or 0)


def width(spec: LLASpec, value_wide: bool) -> int:
    """Columns of an operand's tile."""
    return max(_LEAST_WIDTH, padded_width(spec.head_dim_v if value_wide else spec.head_dim))


def _columns(spec: LLASpec, source: SweepSource, names: tuple[str, ...]) -> int:
    return sum(width(spec, name in source.value_wide) for name in names)


def registers(spec: LLASpec, source: SweepSource, shape: Shape, in_registers: int = 0) -> int:
    """What a thread that holds something takes, with so many of the held operands in registers.

    Sums, and scores, whose registers the weights take over; numbers of held rows, or of streamed ones as far as they are
    read ahead.
    """
    count = _columns(spec, source, source.sums) // 2 + len(source.sweep.scores) * shape.streamed // 2
    count += _columns(spec, source, source.held[:in_registers]) // 4
    count += 2 * source.numbers if source.sweep.holds == "rows" else shape.streamed // _ROWS_A_REGISTER
    return count + _OTHER_REGISTERS + (_WINDOW_REGISTERS if spec.window_size is not None else 0)


def operands_in_registers(spec: LLASpec, source: SweepSource, shape: Shape) -> int:
    """How many of the held operands a block has in registers: shared memory is read as fast as products can run, no
    faster, and so has only one of their operands to deliver."""
    counts = range(len(source.held), 0, -1)
    return next((n for n in counts if registers(spec, source, shape, n) <= REGISTERS[shape.groups]), 0)


def shared_memory(spec: LLASpec, source: SweepSource, shape: Shape) -> int:
    """Bytes of struct Shared in stream_saved.cuh."""
    numbers = shape.streamed * source.numbers if source.sweep.holds == "keys" else _ALIGNMENT // _FLOAT_BYTES
    streamed, held = (_columns(spec, source, names) * _INPUT_BYTES for names in (source.streamed, source.held))
    stage = shape.streamed * streamed + numbers * _FLOAT_BYTES + 2 * _BARRIER_BYTES
    block = _BLOCK_BYTES if spec.num_sequences is None else _PACKED_BLOCK_BYTES
    total = shape.stages * stage + shape.held * held + block
    return -(-total // _ALIGNMENT) * _ALIGNMENT


def blocks_per_sm(spec: LLASpec, source: SweepSource, shape: Shape, device: DeviceInfo) -> int:
    """Blocks that a multiprocessor is to hold at once."""
    share = device.shared_memory_per_sm // 2 - _RESERVED_SHARED_MEMORY
    return 2 if shape.groups == 1 and shared_memory(spec, source, shape) <= share else 1


def held_tiles(spec: LLASpec, length: int, held: int) -> int:
    """Of a head, blocks that hold so many of ``length`` rows or keys: of packed sequences the most that there can be."""
    return -(-length // held) if spec.num_sequences is None else length // held + spec.num_sequences


def table_tile(spec: LLASpec, config: KernelConfig) -> int:
    """What the rows of a sequence in the table are a multiple of: every streamed tile has all its rows."""
    return _ROWS_OF_TABLE if spec.num_sequences is None else config.holding_keys.block_q


def table_rows(spec: LLASpec, config: KernelConfig) -> int:
    """Of a head, in the table."""
    tile = table_tile(spec, config)
    return held_tiles(spec, spec.seqlen_q, tile) * tile


def kernels(
    spec: LLASpec, config: KernelConfig, device: DeviceInfo, wanted: tuple[str, ...] | None = None
) -> tuple[Kernel, ...]:
    """The launches that outputs need, in order; ``wanted`` None stands for those of an ordinary call."""
    source = print_backward(spec.op, wanted)
    common = {
        "HEAD_DIM": spec.head_dim, "HEAD_DIM_V": spec.head_dim_v, "BLOCK_D": width(spec, False),
        "BLOCK_DV": width(spec, True), "BFLOAT16": int(spec.dtype == "bfloat16"), "PAGE_SIZE": 0,
        "WEIGHT_SHIFT": weight_shift(spec.dtype), "PACKED": int(spec.num_sequences is not None),
        "TABLE_TILE": table_tile(spec, config),
    }  # fmt: skip
    swept = [_sweep_kernel(spec, sweep, shape_of(sweep, config), device, common) for sweep in source.sweeps]
    order = () if spec.num_sequences is None else (_order_kernel(spec, config, source),)
    return (*order, _rows_kernel(spec, config, source, common), *swept)


def _order_kernel(spec: LLASpec, config: KernelConfig, source: BackwardSource) -> Kernel:
    rows, keys = config.block_q, config.holding_keys.block_k
    tiles = held_tiles(spec, spec.seqlen_q, rows), held_tiles(spec, spec.seqlen_k, keys)
    blocks = sum(-(-count // _ORDER_THREADS) for count in tiles)
    defines = _texts({"BLOCK_ROWS": rows, "BLOCK_KEYS": keys, "CAUSAL": int(spec.is_causal)})
    return Kernel("backward_order", "backward_order.cu", (blocks, 1), _ORDER_THREADS, 0, defines, source.headers)


def _rows_kernel(spec: LLASpec, config: KernelConfig, source: BackwardSource, common: dict[str, object]) -> Kernel:
    rows = _ROWS_THREADS // (max(width(spec, False), width(spec, True)) // 8)
    blocks = -(-spec.batch * spec.num_heads * table_rows(spec, config) // rows)
    defines = _texts(common | {"BLOCK_K": GROUP_ROWS})
    return Kernel("backward_rows", "backward_rows.cu", (blocks, 1), _ROWS_THREADS, 0, defines, source.headers)


def _sweep_kernel(
    spec: LLASpec, source: SweepSource, shape: Shape, device: DeviceInfo, common: dict[str, object]
) -> Kernel:
    holds_keys = source.sweep.holds == "keys"
    length, heads = (spec.seqlen_k, spec.num_kv_heads) if holds_keys else (spec.seqlen_q, spec.num_heads)
    defines = common | {
        "SWEEP": source.sweep.name, "HOLDS_KEYS": int(holds_keys), "HELD_ROWS": shape.held, "BLOCK_K": shape.streamed,
        "STAGES": shape.stages, "CAUSAL": int(spec.is_causal), "WINDOWED": int(spec.window_size is not None),
        "IN_REGISTERS": operands_in_registers(spec, source, shape),
        "BLOCKS": blocks_per_sm(spec, source, shape, device),
    }  # fmt: skip
    return Kernel(
        source.sweep.name, "backward_sweep.cu", (held_tiles(spec, length, shape.held) * spec.batch * heads, 1),
        shape.threads, shared_memory(spec, source, shape), _texts(defines), source.headers,
    )  # fmt: skip


def _texts(defines: dict[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in defines.items()}
