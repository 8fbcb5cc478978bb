"""Decoding in parts, `fused` of operators of one sweep: heuristic default, search space and limits, side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Mapping

from lla_compile.backends.gram_limits import MAX_SPLITS, split_counts, splits_that_fill
from lla_compile.backends.triton import resources, stream_config
from lla_compile.plans import KernelConfig

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.spec import LLASpec

# (block_k, num_warps, num_stages), best first; the first that fits is taken.
_PREFERENCE = ((64, 4, 3), (64, 4, 2), (32, 4, 3), (32, 4, 2), (32, 4, 1), (16, 4, 1))
_RESIDENT = 2  # programs of a multiprocessor that read while others multiply


def default_config(spec: LLASpec, device: DeviceInfo) -> KernelConfig:
    """One tile of as few rows as the queries of a group need, and parts for every multiprocessor."""
    block_q = stream_config.row_blocks(spec)[0]
    for block_k, num_warps, num_stages in _PREFERENCE[2 if spec.dtype == "float32" else 0 :]:
        config = KernelConfig("triton", "fused", block_q, block_k, None, num_warps, num_stages, num_splits=1)
        if infeasible(spec, config, device) is None:
            break
    rows = spec.group_size * spec.seqlen_q
    programs = max(spec.batch * spec.num_kv_heads * -(-rows // block_q), 1)
    return replace(config, num_splits=splits_that_fill(spec, max(device.sms, 1) * _RESIDENT // programs))


def search_space(spec: LLASpec, device: DeviceInfo) -> Mapping[str, tuple]:
    """Values worth trying."""
    return {
        "schedule": ("fused",),
        "block_q": stream_config.row_blocks(spec),
        "block_k": (32, 64, 128),
        "cg_max_iters": (None,),
        "num_warps": (2, 4, 8),
        "num_stages": (2, 3, 4, 5),
        "num_splits": split_counts(spec),
    }


def infeasible(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str | None:
    """The limit that ``config`` breaks on ``device``, in words, or None."""
    if config.schedule != "fused" or config.block_d is not None:
        return f"{spec.op} decodes with the schedule fused, without block_d, got {config.schedule}"
    if not config.num_splits or not 1 <= config.num_splits <= MAX_SPLITS:
        return f"num_splits must be from 1 to {MAX_SPLITS}, got {config.num_splits}"
    if config.block_q < stream_config.MIN_ROWS:
        return f"block_q must be at least {stream_config.MIN_ROWS}, got {config.block_q}"
    return resources.infeasible_shared_rows(spec, config, device)
