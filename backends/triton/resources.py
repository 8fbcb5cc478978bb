"""The hardware limits of a Triton configuration, stated once: the tuner prunes by them, the heuristic stays within."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from lla_compile.precision import split_terms

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.plans import KernelConfig
    from lla_compile.spec import LLASpec

_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_MAX_REGISTERS = 255  # of a thread; what is left for addresses and row state beyond the tiles follows
_REGISTERS_BESIDE_TILES = 40
_MMA_ROWS = 16  # rows of query that one warp needs to own in a matrix instruction
_BARRIER_BYTES = 256
_FUSED_ON_TCGEN05 = (3, 9)  # 3.6 fails in its tensor-memory layout pass; the versions between were not tried


def interpreting() -> bool:
    """Whether TRITON_INTERPRET asks Triton to run kernels on the CPU, where no limit of a GPU holds."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def padded_width(head_dim: int) -> int:
    """Columns of a tile that holds ``head_dim``: a power of two, at least the 16 of a matrix instruction."""
    return max(16, 1 << (head_dim - 1).bit_length())


@dataclass(frozen=True)
class _Placement:
    """Where a generation of tensor cores wants the operands of a tile product.

    Attributes:
        row_copies: of a computed row operand (direction, probe) in shared memory; 0 keeps it in registers.
        weights_in_shared: so do the weights, because warps exchange their columns.
        stages: key tiles in shared memory at a time.
        extra_bytes: what the instructions need beside the tiles.
    """

    row_copies: int
    weights_in_shared: bool
    stages: int
    extra_bytes: int = 0


def _placement(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> _Placement:
    capability = float(device.compute_capability)
    width = max(padded_width(spec.head_dim), padded_width(spec.head_dim_v))
    stages = max(config.num_stages, 1)
    terms = split_terms(spec.dtype, spec.precision)
    if (spec.dtype, spec.precision) == ("float32", "accurate"):
        terms = 3  # of a tf32x3 product
    loaded = config.schedule == "split"  # a split sweep loads its row operands instead of computing them
    if 9 <= capability < 10:  # wgmma: four warps own 64 rows; more of them share rows
        crossed = config.num_warps > 4 and config.block_q < _MMA_ROWS * config.num_warps
        in_shared = crossed or loaded or spec.dtype == "float32"
        return _Placement(terms * in_shared, crossed, stages)
    if _is_tcgen05(device):  # operands come from shared memory; a split leaves one more copy behind
        return _Placement(2 * terms - 1, False, stages, _BARRIER_BYTES)
    # mma.sync: the tile in use is in registers, and wide products lay the warps along columns
    crossed = config.block_q < width or config.block_q < config.block_k
    return _Placement(terms * (crossed or loaded), crossed, max(stages - 1, 1))


def _is_tcgen05(device: DeviceInfo) -> bool:
    return 10 <= float(device.compute_capability) < 12


@lru_cache(maxsize=None)
def _triton_version() -> tuple[int, int]:
    major, minor = importlib.metadata.version("triton").split(".")[:2]
    return int(major), int(minor)


def shared_memory_bytes(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> int:
    """Shared memory of a block in the output sweep, which needs most: row operands, weights, key and value tiles."""
    placement, terms = _placement(spec, config, device), split_terms(spec.dtype, spec.precision)
    width, width_v = padded_width(spec.head_dim), padded_width(spec.head_dim_v)
    elements = config.block_q * width + placement.stages * config.block_k * (width + width_v)
    elements += placement.row_copies * config.block_q * width
    if placement.weights_in_shared:
        elements += terms * config.block_q * config.block_k
    return _ITEM_BYTES[spec.dtype] * elements + placement.extra_bytes


def registers_per_thread(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> int:
    """32-bit registers that the tiles of the hottest loop take: the accumulator, two score tiles and the operands.

    Row state (probe, residual, direction) is not in it: it is idle during the loop, and the compiler moves it to
    local memory around the loop at little cost.
    """
    item = _ITEM_BYTES[spec.dtype]
    placement, terms = _placement(spec, config, device), split_terms(spec.dtype, spec.precision)
    width = max(padded_width(spec.head_dim), padded_width(spec.head_dim_v))
    accumulator = config.block_q * width
    scores = 2 * config.block_q * config.block_k
    columns = config.block_k + (0 if placement.row_copies else width)
    operands = terms * config.block_q * columns * item // 4
    return (accumulator + scores + operands) // (32 * config.num_warps) + _REGISTERS_BESIDE_TILES


def infeasible(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str | None:
    """The limit that ``config`` breaks on ``device``, in words, or None."""
    if interpreting():
        return None
    if _is_tcgen05(device) and config.schedule == "fused" and _triton_version() < _FUSED_ON_TCGEN05:
        needed = ".".join(map(str, _FUSED_ON_TCGEN05))
        return f"Triton before {needed} does not compile the fused kernel for compute capability 10"
    if config.block_q < _MMA_ROWS * config.num_warps and config.block_q < 64:
        return f"block_q {config.block_q} leaves {config.num_warps} warps without {_MMA_ROWS} rows each"
    if config.num_warps > 4 and config.block_q < _MMA_ROWS * config.num_warps and config.block_k < 64:
        return f"{config.num_warps} warps share {config.block_q} rows, which needs block_k >= 64"
    shared = shared_memory_bytes(spec, config, device)
    if shared > device.shared_memory_per_block:
        return f"shared memory {shared} B > {device.shared_memory_per_block} B of a block on {device.id}"
    registers = registers_per_thread(spec, config, device)
    if registers > _MAX_REGISTERS:
        return f"about {registers} registers a thread > {_MAX_REGISTERS}: the inner loop would spill"
    if config.num_warps * 32 * min(registers, _MAX_REGISTERS) > device.registers_per_sm:
        return f"registers of {config.num_warps} warps exceed the {device.registers_per_sm} of a multiprocessor"
    return None
