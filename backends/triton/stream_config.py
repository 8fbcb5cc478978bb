"""Decoding's `fused` schedule, which streams the cache for every sweep: heuristic default, search space and limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Mapping

from lla_compile.backends.gram_limits import CG_MAX_ITERS
from lla_compile.backends.triton import resources
from lla_compile.plans import KernelConfig

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.spec import LLASpec

MIN_ROWS = 16  # of a matrix instruction: a group with fewer queries leaves some idle
# (block_k, num_warps, num_stages), best first; the first that fits is taken. float32 products of 64 keys would spill.
_PREFERENCE = ((64, 4, 3), (64, 4, 2), (32, 4, 3), (32, 4, 2), (32, 4, 1), (16, 4, 2), (16, 4, 1))


def default_config(spec: LLASpec, device: DeviceInfo) -> KernelConfig:
    """One tile of as few rows as the queries of a group need."""
    for block_k, num_warps, num_stages in _PREFERENCE[2 if spec.dtype == "float32" else 0 :]:
        config = KernelConfig("triton", "fused", row_blocks(spec)[0], block_k, CG_MAX_ITERS, num_warps, num_stages)
        if infeasible(spec, config, device) is None:
            break
    return config


def search_space(spec: LLASpec, device: DeviceInfo) -> Mapping[str, tuple]:
    """Values worth trying."""
    return {
        "schedule": ("fused",),
        "block_q": row_blocks(spec),
        "block_k": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
        "cg_max_iters": (CG_MAX_ITERS,),
    }


def row_blocks(spec: LLASpec) -> tuple[int, ...]:
    """Tiles that hold the queries of a group at once, or as many of them as 64 rows are."""
    rows = spec.group_size * spec.seqlen_q
    return tuple(block for block in (16, 32, 64) if block < 2 * rows or block == MIN_ROWS)[::-1][:2]


def infeasible(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str | None:
    """The limit that ``config`` breaks on ``device``, in words, or None."""
    if config.num_splits is not None or config.block_d is not None:
        return f"fused has no num_splits and no block_d, got {config.num_splits} and {config.block_d}"
    if config.block_q < MIN_ROWS:
        return f"block_q must be at least {MIN_ROWS}, got {config.block_q}"
    return resources.infeasible_shared_rows(spec, config, device)
