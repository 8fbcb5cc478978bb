"""The hardware limits of a Triton configuration, stated once: the tuner prunes by them, the heuristic stays within."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lla_compile.precision import split_terms

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.plan import KernelConfig
    from lla_compile.spec import LLASpec

_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_MAX_REGISTERS = 255  # of a thread; what is left for addresses and row state beyond the tiles follows
_REGISTERS_BESIDE_TILES = 40
_MMA_ROWS = 16  # rows of query that one warp needs to own in a matrix instruction


def padded_width(head_dim: int) -> int:
    """Columns of a tile that holds ``head_dim``: a power of two, at least the 16 of a matrix instruction."""
    return max(16, 1 << (head_dim - 1).bit_length())


def shared_memory_bytes(spec: LLASpec, config: KernelConfig) -> int:
    """Shared memory of a block: the row operands and the key and value tiles of every pipeline stage.

    The output sweep needs most. A `fused` kernel computes its probe in registers, a `split` one loads it.
    """
    item = _ITEM_BYTES[spec.dtype]
    width, width_v = padded_width(spec.head_dim), padded_width(spec.head_dim_v)
    row_operands = 1 if config.schedule == "fused" else 1 + split_terms(spec.dtype, spec.precision)
    rows = config.block_q * width * row_operands
    stages = max(config.num_stages, 1)
    return item * (rows + stages * config.block_k * (width + width_v))


def registers_per_thread(spec: LLASpec, config: KernelConfig) -> int:
    """32-bit registers that the tiles of the hottest loop take: the accumulator, two score tiles and the operands.

    Row state (probe, residual, direction) is not in it: it is idle during the loop, and the compiler moves it to
    local memory around the loop at little cost.
    """
    item = _ITEM_BYTES[spec.dtype]
    terms = split_terms(spec.dtype, spec.precision)
    width = max(padded_width(spec.head_dim), padded_width(spec.head_dim_v))
    accumulator = config.block_q * width
    scores = 2 * config.block_q * config.block_k
    operands = terms * config.block_q * (width + config.block_k) * item // 4
    return (accumulator + scores + operands) // (32 * config.num_warps) + _REGISTERS_BESIDE_TILES


def infeasible(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str | None:
    """The limit that ``config`` breaks on ``device``, in words, or None."""
    if config.block_q < _MMA_ROWS * config.num_warps and config.block_q < 64:
        return f"block_q {config.block_q} leaves {config.num_warps} warps without {_MMA_ROWS} rows each"
    if config.num_warps > 4 and config.block_q < _MMA_ROWS * config.num_warps and config.block_k < 64:
        return f"{config.num_warps} warps share {config.block_q} rows, which needs block_k >= 64"
    shared = shared_memory_bytes(spec, config)
    if shared > device.shared_memory_per_block:
        return f"shared memory {shared} B > {device.shared_memory_per_block} B of a block on {device.id}"
    registers = registers_per_thread(spec, config)
    if registers > _MAX_REGISTERS:
        return f"about {registers} registers a thread > {_MAX_REGISTERS}: the inner loop would spill"
    if config.num_warps * 32 * min(registers, _MAX_REGISTERS) > device.registers_per_sm:
        return f"registers of {config.num_warps} warps exceed the {device.registers_per_sm} of a multiprocessor"
    return None
