"""The `gram` schedule's limits, heuristic default and search space, side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Mapping

from lla_compile.backends.gram_limits import CG_MAX_ITERS, MAX_SPLITS, split_counts, splits_that_fill, unsupported
from lla_compile.backends.triton.resources import interpreting, is_tcgen05, padded_width, refused_on_tcgen05
from lla_compile.plans import KernelConfig

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.spec import LLASpec

# (block_d, block_k, num_warps, num_stages), best first; the first that fits is taken. With wgmma a warpgroup owns 64
# rows; without, operands come through registers, and larger tiles spill.
_PREFERENCE = {
    True: ((128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2)),
    False: ((64, 16, 8, 3), (64, 16, 8, 2), (64, 16, 4, 1)),
}
_BLOCK_K = {True: (32, 64), False: (16, 32, 64)}
_NARROW = 16  # columns of the products that only sum
_REGISTERS_BESIDE_TILES = 40
_MAX_REGISTERS = 255
_BARRIER_BYTES = 512
_EPILOGUE_BYTES = 256  # a held row, to lay accumulators out for their store


def default_config(spec: LLASpec, device: DeviceInfo) -> KernelConfig:
    """Whole covariances where they fit, and parts for every multiprocessor, but none of a few keys."""
    width = padded_width(spec.head_dim)
    for block_d, block_k, num_warps, num_stages in _PREFERENCE[_has_wgmma(device)]:
        block_d = min(block_d, width)
        config = KernelConfig(
            "triton", "gram", 1, block_k, CG_MAX_ITERS, min(num_warps, max(width // 16, 1)), num_stages,
            num_splits=1, block_d=block_d,
        )  # fmt: skip
        if infeasible(spec, config, device) is None:
            break
    programs = max(spec.batch * spec.num_heads * spec.seqlen_q * (width // config.block_d), 1)
    resident = max(device.sms, 1) * (1 if width > 64 else 2)
    return replace(config, num_splits=splits_that_fill(spec, resident // programs))


def search_space(spec: LLASpec, device: DeviceInfo) -> Mapping[str, tuple]:
    """Values worth trying."""
    width = padded_width(spec.head_dim)
    return {
        "schedule": ("gram",),
        "block_q": (1,),
        "block_k": _BLOCK_K[_has_wgmma(device)],
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
        "cg_max_iters": (CG_MAX_ITERS,),
        "num_splits": split_counts(spec),
        "block_d": tuple({min(width, 64), width}),
    }


def infeasible(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str | None:
    """The limit that ``config`` breaks on ``device``, in words, or None."""
    if why := unsupported(spec):
        return why
    width, width_v = padded_width(spec.head_dim), padded_width(spec.head_dim_v)
    if config.block_q != 1:
        return f"gram has block_q 1, got {config.block_q}"
    if not config.num_splits or not 1 <= config.num_splits <= MAX_SPLITS:
        return f"num_splits must be from 1 to {MAX_SPLITS}, got {config.num_splits}"
    if not config.block_d or width % config.block_d or config.block_d < 16:
        return f"block_d must divide {width}, got {config.block_d}"
    if interpreting():
        return None
    if is_tcgen05(device) and (why := refused_on_tcgen05()):
        return why
    if config.block_d < 16 * config.num_warps and config.block_d < 64:
        return f"block_d {config.block_d} leaves {config.num_warps} warps without 16 rows each"
    item, copies = 2, 2 if is_tcgen05(device) else 1
    streamed = config.block_k * (width + width_v + (config.block_d if config.block_d < width else 0))
    narrow = _NARROW * config.block_k
    shared = item * (max(config.num_stages, 1) * streamed + copies * config.block_k * config.block_d + 2 * narrow)
    shared = max(shared + _BARRIER_BYTES * is_tcgen05(device), _EPILOGUE_BYTES * config.block_d)
    if shared > device.shared_memory_per_block:
        return f"shared memory {shared} B > {device.shared_memory_per_block} B of a block on {device.id}"
    accumulators = config.block_d * (width + width_v + _NARROW) + width_v * _NARROW
    tile = config.block_k * width
    registers = (accumulators + tile) // (32 * config.num_warps) + _REGISTERS_BESIDE_TILES
    if registers > _MAX_REGISTERS:
        return f"about {registers} registers a thread > {_MAX_REGISTERS}: the inner loop would spill"
    return None


def _has_wgmma(device: DeviceInfo) -> bool:
    return 9 <= float(device.compute_capability or 0) < 12
