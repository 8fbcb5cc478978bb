"""A plan in a few words, for tables and lines of progress."""

from __future__ import annotations

from lla_compile.plans import KernelConfig


def short(config: KernelConfig) -> str:
    """Backend, schedule, tile and the other knobs; after a semicolon the tile of the sweep that holds keys, if its own.

    "triton fused 64x64, 4 warps, 3 stages, 32 CG; kv 32x64, 8 warps, 2 stages"
    "triton gram 1x64, 4 warps, 3 stages, 16 splits, block_d 64, 32 CG"
    """
    text = f"{config.backend} {config.schedule} {_tile(config)}"
    if config.cg_max_iters is not None:
        text += f", {config.cg_max_iters} CG"
    kv = config.holding_keys
    return text if kv == config else f"{text}; kv {_tile(kv)}"


def _tile(config: KernelConfig) -> str:
    parts = [f"{config.block_q}x{config.block_k}"]
    for count, unit in ((config.num_warps, "warps"), (config.num_stages, "stages")):
        if count is not None:
            parts.append(f"{count} {unit}")
    parts += [f"{config.num_splits} splits"] if config.num_splits is not None else []
    parts += [f"block_d {config.block_d}"] if config.block_d is not None else []
    return ", ".join(parts)
