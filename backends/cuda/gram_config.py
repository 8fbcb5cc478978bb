"""The `gram` schedule's limits, heuristic default and search space, side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Mapping

from lla_compile.backends import gram_limits
from lla_compile.backends.cuda import gram_kernels
from lla_compile.backends.tiles import padded_width
from lla_compile.plans import KernelConfig

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.spec import LLASpec

# (block_k, num_stages) with wgmma and without, best first; the first that fits is taken.
_PREFERENCE = {True: ((64, 6), (64, 5), (64, 4)), False: ((64, 4), (64, 3), (32, 4), (32, 3), (16, 3))}
# While a tile is multiplied the next one is weighed, and with wgmma yet another one made ready; one more is copied.
_LEAST_STAGES = {True: 4, False: 3}
# Rows of wgmma's swizzled operands repeat after 1024 bytes, which a stage must not cut.
_LEAST_BLOCK_K = {True: 32, False: 16}
_MOST_REGISTERS = 256  # of a thread
_RESERVED_SHARED_MEMORY = 1024  # of a multiprocessor, for each block


def unsupported(spec: LLASpec, device: DeviceInfo) -> str | None:
    """Why no configuration can run the spec on the device, or None."""
    return gram_limits.unsupported(spec)


def default_config(spec: LLASpec, device: DeviceInfo) -> KernelConfig:
    """The device's best kernel: tiles as deep as fit, and parts for every multiprocessor, but none of a few keys."""
    return _default(spec, device, gram_kernels.warp_counts(spec, device)[0])


def alternatives(spec: LLASpec, device: DeviceInfo) -> tuple[KernelConfig, ...]:
    """The same of the device's other kernel, if it has one."""
    others = (_default(spec, device, num_warps) for num_warps in gram_kernels.warp_counts(spec, device)[1:])
    return tuple(config for config in others if infeasible(spec, config, device) is None)


def _default(spec: LLASpec, device: DeviceInfo, num_warps: int) -> KernelConfig:
    width = padded_width(spec.head_dim)
    for block_k, num_stages in _PREFERENCE[num_warps == gram_kernels.group_warps(spec)]:
        config = KernelConfig(
            "cuda", "gram", 1, block_k, gram_limits.CG_MAX_ITERS, num_warps, num_stages, num_splits=1, block_d=width
        )
        if infeasible(spec, config, device) is None:
            break
    programs = max(spec.batch * spec.num_heads * spec.seqlen_q, 1)
    blocks = device.sms * _enough(spec, config, device)
    return replace(config, num_splits=gram_limits.splits_that_fill(spec, blocks // programs))


def search_space(spec: LLASpec, device: DeviceInfo) -> Mapping[str, tuple]:
    """Values worth trying; how many warps there are says which kernel it is, see :mod:`gram_kernels`."""
    return {
        "schedule": ("gram",),
        "block_q": (1,),
        "block_k": (32, 64),
        "num_warps": gram_kernels.warp_counts(spec, device),
        "num_stages": (3, 4, 5, 6),
        "cg_max_iters": (gram_limits.CG_MAX_ITERS,),
        "num_splits": gram_limits.split_counts(spec),
        "block_d": (padded_width(spec.head_dim),),
    }


def infeasible(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str | None:
    """The limit that ``config`` breaks on ``device``, in words, or None."""
    if why := unsupported(spec, device):
        return why
    width = padded_width(spec.head_dim)
    if config.schedule != "gram" or config.block_q != 1:
        return f"decoding has schedule gram with block_q 1, got {config.schedule} with {config.block_q}"
    if not config.num_splits or not 1 <= config.num_splits <= gram_limits.MAX_SPLITS:
        return f"num_splits must be from 1 to {gram_limits.MAX_SPLITS}, got {config.num_splits}"
    if config.block_d != width:
        return f"a block holds all {width} rows of the covariances, got block_d {config.block_d}"
    wgmma = gram_kernels.uses_wgmma(spec, config)
    if config.block_k % _LEAST_BLOCK_K[wgmma] or config.block_k < 1:
        return f"block_k must be a multiple of {_LEAST_BLOCK_K[wgmma]}, got {config.block_k}"
    if (config.num_stages or 0) < _LEAST_STAGES[wgmma]:
        return f"num_stages must be at least {_LEAST_STAGES[wgmma]}, got {config.num_stages}"
    warps = gram_kernels.warp_counts(spec, device)
    if config.num_warps not in warps:
        return f"num_warps must be one of {', '.join(map(str, warps))}, got {config.num_warps}"
    for kernel in gram_kernels.kernels(spec, config, device):
        if kernel.shared > device.shared_memory_per_block:
            return f"shared memory {kernel.shared} B > {device.shared_memory_per_block} B of a block on {device.id}"
    return None


def _enough(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> int:
    """Blocks of the pass that keep a multiprocessor busy: with wgmma one does, and fewer parts are merged then."""
    if gram_kernels.uses_wgmma(spec, config):
        return 1
    gram_pass = gram_kernels.kernels(spec, config, device)[0]
    by_memory = device.shared_memory_per_sm // (gram_pass.shared + _RESERVED_SHARED_MEMORY)
    by_registers = device.registers_per_sm // (_MOST_REGISTERS * gram_pass.threads)
    return max(min(by_memory, by_registers), 1)
