"""Decoding in parts, operators of one sweep: limits, heuristic default and search space, side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Mapping

from lla_compile.backends.cuda import part_kernels
from lla_compile.backends.gram_limits import MAX_SPLITS, split_counts, splits_that_fill
from lla_compile.plans import KernelConfig

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.spec import LLASpec

MAX_HEAD_DIM = 128  # the sums of wider heads and the rows beside them are more than a thread's registers
_MOST_REGISTERS = 255  # of a thread
_ROW_BLOCKS = (8, 16, 32, 64)
# Stages worth having, best first; of those that fit the first that has so many bytes on their way to a multiprocessor.
_STAGES = (3, 4, 6, 2)
_BYTES_IN_FLIGHT = 64 * 1024
_BLOCK_K = 64
_KEY_WARPS, _MOST_WARPS = (1, 2, 4, 8), 8
_MOST_KEYS = 32  # of a warp, by default: their scores take registers
_LEAST_STAGES = 2  # one is multiplied while the next one is copied


def unsupported(spec: LLASpec, device: DeviceInfo) -> str | None:
    """Why no configuration can run the spec on the device, or None."""
    if spec.dtype not in ("float16", "bfloat16"):
        return f"decoding of {spec.op} has no {spec.dtype} kernel"
    widest = max(spec.head_dim, spec.head_dim_v)
    if widest > MAX_HEAD_DIM:
        return f"decoding of {spec.op} has heads of at most {MAX_HEAD_DIM} dimensions, got {widest}"
    return None


def default_config(spec: LLASpec, device: DeviceInfo) -> KernelConfig:
    """As few rows as the queries of a group need, as much on its way as keeps memory busy, and parts for every
    multiprocessor."""
    block_q = row_blocks(spec)[-1]
    row_warps = block_q // part_kernels.WARP_ROWS
    num_warps = min(4 * row_warps, _MOST_WARPS)
    block_k = min(_BLOCK_K, _MOST_KEYS * num_warps // row_warps)
    configs = [KernelConfig("cuda", "fused", block_q, block_k, None, num_warps, n, num_splits=1) for n in _STAGES]
    fits = [config for config in configs if infeasible(spec, config, device) is None] or configs[-1:]
    flights = {config: part_kernels.bytes_in_flight(spec, config, device) for config in fits}
    enough = [config for config in fits if flights[config] >= _BYTES_IN_FLIGHT]
    config = enough[0] if enough else max(fits, key=flights.__getitem__)
    rows = spec.group_size * spec.seqlen_q
    programs = max(spec.batch * spec.num_kv_heads * -(-rows // block_q), 1)
    blocks = max(device.sms, 1) * part_kernels.resident(spec, config, device)
    return replace(config, num_splits=splits_that_fill(spec, blocks // programs))


def alternatives(spec: LLASpec, device: DeviceInfo) -> tuple[KernelConfig, ...]:
    """None: there is one kernel, and one schedule."""
    return ()


def search_space(spec: LLASpec, device: DeviceInfo) -> Mapping[str, tuple]:
    """Values worth trying."""
    return {
        "schedule": ("fused",),
        "block_q": row_blocks(spec)[-2:],
        "block_k": (32, 64, 128),
        "cg_max_iters": (None,),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4, 5, 6),
        "num_splits": split_counts(spec),
    }


def row_blocks(spec: LLASpec) -> tuple[int, ...]:
    """Tiles up to the one that holds the queries of a group at once, or as many of them as 64 rows are."""
    rows = spec.group_size * spec.seqlen_q
    return tuple(block for block in _ROW_BLOCKS if block < 2 * rows or block == part_kernels.WARP_ROWS)


def infeasible(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str | None:
    """The limit that ``config`` breaks on ``device``, in words, or None."""
    if why := unsupported(spec, device):
        return why
    if config.schedule != "fused" or config.block_d is not None:
        return f"{spec.op} decodes with the schedule fused, without block_d, got {config.schedule}"
    if not config.num_splits or not 1 <= config.num_splits <= MAX_SPLITS:
        return f"num_splits must be from 1 to {MAX_SPLITS}, got {config.num_splits}"
    if config.block_q not in _ROW_BLOCKS:
        return f"block_q must be one of {', '.join(map(str, _ROW_BLOCKS))}, got {config.block_q}"
    row_warps = config.block_q // part_kernels.WARP_ROWS
    warps = [row_warps * key_warps for key_warps in _KEY_WARPS if row_warps * key_warps <= _MOST_WARPS]
    if config.num_warps not in warps:
        return f"num_warps must be {', '.join(map(str, warps))} for {config.block_q} rows, got {config.num_warps}"
    keys = part_kernels.key_warps(config) * part_kernels.MATRIX_KEYS
    if config.block_k % keys or config.block_k < 1:
        return f"block_k must be a multiple of {keys}, for all warps that have keys of their own, got {config.block_k}"
    if (config.num_stages or 0) < _LEAST_STAGES:
        return f"num_stages must be at least {_LEAST_STAGES}, got {config.num_stages}"
    if (registers := part_kernels.registers(spec, config)) > _MOST_REGISTERS:
        return f"{registers} registers of a thread > {_MOST_REGISTERS}"
    shared = part_kernels.shared_memory(spec, config)
    if shared > device.shared_memory_per_block:
        return f"shared memory {shared} B > {device.shared_memory_per_block} B of a block on {device.id}"
    return None
