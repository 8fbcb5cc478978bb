"""Limits, heuristic default and search space of sweeps that hold query rows, side by side."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Mapping

from lla_compile.backends.cuda import sweep_kernels
from lla_compile.plans import KernelConfig

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.spec import LLASpec

CG_MAX_ITERS = 32
_SCHEDULES = ("fused", "split")
_DTYPES = ("float16", "bfloat16")
_MAX_WIDTH = 128  # wider sums and scores do not fit in registers together


def unsupported(spec: LLASpec, device: DeviceInfo) -> str | None:
    """Why no configuration can run the spec on the device, or None."""
    if spec.dtype not in _DTYPES:
        return f"it has no {spec.dtype} kernel for the forward pass"
    widest = max(spec.head_dim, spec.head_dim_v)
    if widest > _MAX_WIDTH:
        return f"its forward kernels hold at most {_MAX_WIDTH} dimensions, got {widest}"
    return None


def default_config(spec: LLASpec, device: DeviceInfo) -> KernelConfig:
    """Of the preferred tiles the one with the most rows on a multiprocessor, then the first; with as many stages as
    leave room for the rows' state."""
    path = sweep_kernels.path(spec, device)
    configs = [_config(spec, path, *tile, stages) for tile in path.preference for stages in path.stages]
    feasible = [config for config in configs if infeasible(spec, config, device) is None]

    def merit(config: KernelConfig) -> tuple[int, ...]:
        vectors, _ = sweep_kernels.parked(spec, config, device)
        rows = config.block_q * sweep_kernels.blocks_per_sm(spec, config, device)
        return rows, -path.preference.index((config.block_q, config.block_k)), vectors, config.num_stages

    return max(feasible, key=merit) if feasible else _config(spec, path, *path.preference[-1], path.stages[0])


def _config(spec: LLASpec, path: sweep_kernels.Path, block_q: int, block_k: int, num_stages: int) -> KernelConfig:
    cg_max_iters = CG_MAX_ITERS if spec.solves else None
    config = KernelConfig("cuda", "fused", block_q, block_k, cg_max_iters, None, num_stages)
    return sweep_kernels.with_warps(config, path)


def alternatives(spec: LLASpec, device: DeviceInfo) -> tuple[KernelConfig, ...]:
    """The other tiles with as many stages as fit."""
    path, default = sweep_kernels.path(spec, device), default_config(spec, device)
    others = []
    for block_q, block_k in itertools.product(path.block_q, path.block_k):
        configs = (_config(spec, path, block_q, block_k, stages) for stages in reversed(path.stages))
        fitting = next((config for config in configs if infeasible(spec, config, device) is None), None)
        if fitting and (block_q, block_k) != (default.block_q, default.block_k):
            others.append(fitting)
    return tuple(others)


def search_space(spec: LLASpec, device: DeviceInfo) -> Mapping[str, tuple]:
    """Values worth trying; warps follow from the rows of a block."""
    path = sweep_kernels.path(spec, device)
    warps = (_config(spec, path, block_q, path.block_k[0], path.stages[0]).num_warps for block_q in path.block_q)
    return {
        "schedule": _SCHEDULES if spec.solves else _SCHEDULES[:1],
        "block_q": path.block_q,
        "block_k": path.block_k,
        "num_warps": tuple(warps),
        "num_stages": path.stages,
        "cg_max_iters": (24, 32, 48) if spec.solves else (None,),
    }


def infeasible(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str | None:
    """The limit that ``config`` breaks on ``device``, in words, or None."""
    if why := unsupported(spec, device):
        return why
    if config.schedule not in _SCHEDULES:
        return f"the forward pass has schedules {' and '.join(_SCHEDULES)}, got {config.schedule}"
    if config.schedule == "split" and not spec.solves:
        return f"{spec.op} solves nothing: its forward pass is one sweep, schedule fused, got {config.schedule}"
    path = sweep_kernels.path(spec, device)
    if config.block_q not in path.block_q or config.block_k not in path.block_k:
        return f"a tile has {path.block_q} queries and {path.block_k} keys, got {config.block_q} and {config.block_k}"
    warps = sweep_kernels.with_warps(config, path).num_warps
    if config.num_warps != warps:
        return f"{config.block_q} queries take {warps} warps, got {config.num_warps}"
    if (config.num_stages or 0) < path.stages[0]:
        return f"num_stages must be at least {path.stages[0]}, got {config.num_stages}"
    registers, limit = sweep_kernels.registers(spec, config, device), path.row_registers[config.block_q]
    if registers > limit:
        return f"{registers} registers > {limit} of a thread that holds rows"
    room = device.shared_memory_per_block
    if (least := sweep_kernels.shared_memory(spec, config, device)) > room:
        return f"shared memory {least} B > {room} B of a block on {device.id}"
    return None
