"""The kernels of decoding in parts: their constants, and what they take of a multiprocessor; see the ``.cu`` files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lla_compile.backends.cuda.gram_kernels import Kernel
from lla_compile.backends.cuda.part_source import print_parts
from lla_compile.backends.part_layout import part_numel
from lla_compile.backends.tiles import padded_width
from lla_compile.precision import split_terms

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig
    from lla_compile.spec import LLASpec

WARP_ROWS = 8  # the kernels' constant ROWS
MATRIX_KEYS = 16  # of an instruction: a warp takes a multiple of them of a tile
_MERGE_GROUPS, _MERGE_COLUMNS = 16, 32
_OTHER_REGISTERS = 56  # addresses, copies, numbers of rows
_RESERVED_SHARED_MEMORY = 1024  # of a multiprocessor, for each block
_MOST_BLOCKS = 4  # that the compiler is to leave registers for


def key_warps(config: KernelConfig) -> int:
    """Warps of a block that take keys of their own; the others of a block have other rows."""
    return config.num_warps * WARP_ROWS // config.block_q


def registers(spec: LLASpec, config: KernelConfig) -> int:
    """What a thread of the pass cannot do without: sums, rows as operands, scores and weights, and the pages of the
    rows that it copies."""
    (sweep,) = print_parts(spec.op).program.sweeps
    keys = config.block_k // key_warps(config)
    sums = len(sweep.accumulators) * padded_width(spec.head_dim_v) // 4
    pages = keys if (spec.page_size or MATRIX_KEYS) % MATRIX_KEYS else 0  # of others one serves many rows
    return sums + padded_width(spec.head_dim) // 4 + keys + pages + _OTHER_REGISTERS


def shared_memory(spec: LLASpec, config: KernelConfig) -> int:
    """Bytes of struct Shared in part_pass.cu: tiles, and after all keys have been read what each warp has summed."""
    width, width_v = padded_width(spec.head_dim), padded_width(spec.head_dim_v)
    stages = 2 * config.num_stages * config.block_k * (width + width_v)
    sums = 4 * key_warps(config) * config.block_q * part_numel(print_parts(spec.op).program, spec)
    return max(stages, sums)


def bytes_in_flight(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> int:
    """Of keys and values, on their way to a multiprocessor at once."""
    tile = 2 * config.block_k * (padded_width(spec.head_dim) + padded_width(spec.head_dim_v))
    return resident(spec, config, device) * (config.num_stages - 1) * tile


def resident(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> int:
    """Blocks of the pass that a multiprocessor holds at once."""
    by_memory = device.shared_memory_per_sm // (shared_memory(spec, config) + _RESERVED_SHARED_MEMORY)
    by_registers = device.registers_per_sm // (registers(spec, config) * 32 * config.num_warps)
    return max(min(by_memory, by_registers, _MOST_BLOCKS), 1)


def kernels(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> tuple[Kernel, ...]:
    """The launches of a plan in order: the pass, and the merge where there are several parts."""
    source = print_parts(spec.op)
    rows = spec.group_size * spec.seqlen_q
    heads, row_tiles = spec.batch * spec.num_kv_heads, -(-rows // config.block_q)
    width_v = padded_width(spec.head_dim_v)
    part = part_numel(source.program, spec)
    common = {
        "HEAD_DIM_V": spec.head_dim_v, "BLOCK_DV": width_v, "BFLOAT16": int(spec.dtype == "bfloat16"), "PART": part,
    }  # fmt: skip
    passed = common | {
        "HEAD_DIM": spec.head_dim, "BLOCK_D": padded_width(spec.head_dim), "BLOCK_Q": config.block_q,
        "BLOCK_K": config.block_k // key_warps(config), "WARPS": config.num_warps, "STAGES": config.num_stages,
        "PAGE_SIZE": spec.page_size or 0, "BLOCKS": resident(spec, config, device),
        "TERMS": split_terms(spec.dtype, spec.precision),
    }  # fmt: skip
    launches = [
        Kernel(
            "part_pass", "part_pass.cu", (heads * row_tiles * config.num_splits, 1), 32 * config.num_warps,
            shared_memory(spec, config), _text(passed), source.headers,
        )
    ]  # fmt: skip
    if config.num_splits > 1:
        columns = min(width_v, _MERGE_COLUMNS)
        launches.append(
            Kernel(
                "part_merge", "part_merge.cu", (heads * rows, width_v // columns), _MERGE_GROUPS * columns,
                4 * _MERGE_GROUPS * part, _text(common | {"GROUPS": _MERGE_GROUPS}), source.headers,
            )
        )  # fmt: skip
    return tuple(launches)


def _text(constants: dict[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in constants.items()}
