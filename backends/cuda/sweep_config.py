"""Limits, heuristic default and search space of sweeps that hold query rows, side by side."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Mapping

from lla_compile.backends.cuda import sweep_kernels
from lla_compile.backends.tiles import padded_width
from lla_compile.plans import KernelConfig

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.spec import LLASpec

CG_MAX_ITERS = 32
_PHASES = ("forward",)
_DTYPES = ("float16", "bfloat16")
_MAX_WIDTH = 128  # wider sums and scores do not fit in registers together
_LEAST_WIDTH = 64  # of a panel of a tile, which products of rows take
_WGMMA = "9.0"  # the compute capability that has it
_BLOCK_Q, _BLOCK_K = (64, 128, 192), (32, 64, 96)
# A tile whose weights are multiplied, the next one whose scores are, and one that is copied.
_LEAST_STAGES, _STAGES = 3, (3, 4, 5, 6)
# (block_q, block_k), best first; three groups of rows are too many for the registers that wide heads take.
_PREFERENCE = ((128, 64), (64, 64), (64, 32))


def unsupported(spec: LLASpec, device: DeviceInfo) -> str | None:
    """Why no configuration can run the spec on the device, or None."""
    if spec.phase not in _PHASES:
        return f"it has kernels for decoding and the forward pass, not for phase {spec.phase}"
    if not spec.solves:
        return f"its forward kernels are of operators that solve, not of {spec.op}"
    if spec.dtype not in _DTYPES:
        return f"it has no {spec.dtype} kernel for the forward pass"
    widest = max(spec.head_dim, spec.head_dim_v)
    if widest > _MAX_WIDTH:
        return f"its forward kernels hold at most {_MAX_WIDTH} dimensions, got {widest}"
    if spec.num_sequences is not None:
        return "its forward kernels take no packed sequences"
    if device.vendor == "nvidia" and device.compute_capability != _WGMMA:
        return f"its forward kernels need compute capability {_WGMMA}, got {device.compute_capability}"
    if padded_width(spec.head_dim) < _LEAST_WIDTH:
        return f"its forward kernels take more than {_LEAST_WIDTH // 2} dimensions, got {spec.head_dim}"
    return None


def default_config(spec: LLASpec, device: DeviceInfo) -> KernelConfig:
    """The first preferred tile that the device can hold, with as many stages as leave room for the rows' state."""
    for block_q, block_k in _PREFERENCE:
        configs = [_config(block_q, block_k, stages) for stages in _STAGES]
        feasible = [config for config in configs if infeasible(spec, config, device) is None]
        if feasible:
            return max(feasible, key=lambda c: (sweep_kernels.parked_vectors(spec, c, device), c.num_stages))
    return configs[0]


def _config(block_q: int, block_k: int, num_stages: int) -> KernelConfig:
    config = KernelConfig("cuda", "fused", block_q, block_k, CG_MAX_ITERS, None, num_stages)
    return sweep_kernels.with_warps(config)


def alternatives(spec: LLASpec, device: DeviceInfo) -> tuple[KernelConfig, ...]:
    """The other tiles with as many stages as fit."""
    default = default_config(spec, device)
    others = []
    for block_q, block_k in itertools.product(_BLOCK_Q, _BLOCK_K):
        configs = (_config(block_q, block_k, stages) for stages in reversed(_STAGES))
        fitting = next((config for config in configs if infeasible(spec, config, device) is None), None)
        if fitting and (block_q, block_k) != (default.block_q, default.block_k):
            others.append(fitting)
    return tuple(others)


def search_space(spec: LLASpec, device: DeviceInfo) -> Mapping[str, tuple]:
    """Values worth trying; warps follow from the rows of a block."""
    return {
        "schedule": ("fused",),
        "block_q": _BLOCK_Q,
        "block_k": _BLOCK_K,
        "num_warps": tuple(_config(block_q, _BLOCK_K[0], _STAGES[0]).num_warps for block_q in _BLOCK_Q),
        "num_stages": _STAGES,
        "cg_max_iters": (24, 32, 48),
    }


def infeasible(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str | None:
    """The limit that ``config`` breaks on ``device``, in words, or None."""
    if why := unsupported(spec, device):
        return why
    if config.schedule != "fused":
        return f"the forward pass has schedule fused, got {config.schedule}"
    if config.block_q not in _BLOCK_Q or config.block_k not in _BLOCK_K:
        return f"a tile has {_BLOCK_Q} queries and {_BLOCK_K} keys, got {config.block_q} and {config.block_k}"
    warps = sweep_kernels.with_warps(config).num_warps
    if config.num_warps != warps:
        return f"{config.block_q} queries take {warps} warps, got {config.num_warps}"
    if (config.num_stages or 0) < _LEAST_STAGES:
        return f"num_stages must be at least {_LEAST_STAGES}, got {config.num_stages}"
    if (registers := sweep_kernels.registers(spec, config)) > sweep_kernels.row_registers(config):
        return f"{registers} registers > {sweep_kernels.row_registers(config)} of a thread that holds rows"
    room = sweep_kernels.shared_memory_limit(config, device)
    if (least := sweep_kernels.shared_memory(spec, config, 0)) > room:
        return f"shared memory {least} B > {room} B of a block on {device.id}"
    return None
