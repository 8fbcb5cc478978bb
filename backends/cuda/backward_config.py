"""Limits, heuristic default and search space of the backward pass, side by side."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Iterator, Mapping

from lla_compile.backends.cuda import backward_kernels
from lla_compile.backends.cuda.backward_source import SweepSource, print_backward
from lla_compile.plans import KernelConfig

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.spec import LLASpec

_COMPUTE_CAPABILITY = "9.0"  # its instructions are the only ones that there is code for
_DTYPES = ("float16", "bfloat16")
_MAX_WIDTH = 128  # wider sums do not fit in registers with scores
_HELD, _STREAMED, _STAGES = (64, 128, 192), (32, 64, 96, 128), (2, 3, 4, 5, 6)
# (held, streamed), best first. Two groups of 64, so that one's products run beside another's weights: three leave each
# thread registers for half the streamed tile, and more instructions a pair. As many streamed rows as registers allow.
_PREFERENCE = ((128, 64), (128, 32), (64, 32))
_MOST_STAGES = 4  # of a default: a tile is copied in less time than one is multiplied


def unsupported(spec: LLASpec, device: DeviceInfo) -> str | None:
    """Why no configuration can run the spec on the device, or None."""
    if spec.solves:
        return f"its backward kernels are of operators that solve nothing, not of {spec.op}, whose are Triton's"
    if spec.dtype not in _DTYPES:
        return f"it has no {spec.dtype} kernel for the backward pass"
    widest = max(spec.head_dim, spec.head_dim_v)
    if widest > _MAX_WIDTH:
        return f"its backward kernels hold at most {_MAX_WIDTH} dimensions, got {widest}"
    if device.compute_capability != _COMPUTE_CAPABILITY:
        return (
            f"its backward kernels are for compute capability {_COMPUTE_CAPABILITY}, not {device.compute_capability}, "
            "for which Triton has them"
        )
    return None


def default_config(spec: LLASpec, device: DeviceInfo) -> KernelConfig:
    """For each sweep the first preferred tile that fits, in up to four stages."""
    chosen = []
    for source in print_backward(spec.op).sweeps:
        shapes = _shapes(_PREFERENCE, reversed(_STAGES[: _STAGES.index(_MOST_STAGES) + 1]))
        chosen.append(next((x for x in shapes if _exceeds(spec, source, x, device) is None), _least_shape()))
    return _config(*chosen)


def alternatives(spec: LLASpec, device: DeviceInfo) -> tuple[KernelConfig, ...]:
    """For each sweep the other blocks, with the largest streamed tile of each that fits."""
    default, sources = default_config(spec, device), print_backward(spec.op).sweeps
    shapes = [backward_kernels.shape_of(source, default) for source in sources]
    configs = []
    for number, source in enumerate(sources):
        for held in _HELD:
            tiles = ((held, streamed) for streamed in reversed(_STREAMED))
            others = _shapes(tuple(tiles), reversed(_STAGES))
            found = next((x for x in others if _exceeds(spec, source, x, device) is None), None)
            if found and found.held != shapes[number].held:
                configs.append(_config(*shapes[:number], found, *shapes[number + 1 :]))
    return tuple(configs)


def search_space(spec: LLASpec, device: DeviceInfo) -> Mapping[str, tuple]:
    """Values worth trying; warps follow from what a block holds."""
    return {
        "schedule": ("fused",),
        "block_q": _HELD,
        "block_k": _STREAMED,
        "num_stages": _STAGES,
        "cg_max_iters": (None,),
        "kv_block_q": _STREAMED,
        "kv_block_k": _HELD,
        "kv_num_stages": _STAGES,
    }


def infeasible(spec: LLASpec, config: KernelConfig, device: DeviceInfo) -> str | None:
    """The limit that ``config`` breaks on ``device``, in words, or None."""
    if why := unsupported(spec, device):
        return why
    if config.schedule != "fused":
        return f"the backward pass has schedule fused, got {config.schedule}"
    if (config.num_warps, config.kv_num_warps) != (None, None):
        return f"warps follow from what a block holds, got {config.num_warps} and {config.kv_num_warps}"
    for source in print_backward(spec.op).sweeps:
        if why := _exceeds(spec, source, backward_kernels.shape_of(source, config), device):
            return why
    return None


def _exceeds(spec: LLASpec, source: SweepSource, shape: backward_kernels.Shape, device: DeviceInfo) -> str | None:
    """The limit that one sweep breaks, or None."""
    name = source.sweep.name
    if shape.held not in _HELD or shape.streamed not in _STREAMED:
        return f"{name} holds one of {_HELD} and streams tiles of {_STREAMED}, got {shape.held} and {shape.streamed}"
    if shape.stages < _STAGES[0]:
        return f"{name} needs at least {_STAGES[0]} stages, got {shape.stages}"
    registers = backward_kernels.registers(spec, source, shape)
    limit = backward_kernels.REGISTERS[shape.groups]
    if registers > limit:
        return f"{name} takes {registers} registers > {limit} of a thread where a block holds {shape.held}"
    room = device.shared_memory_per_block
    if (shared := backward_kernels.shared_memory(spec, source, shape)) > room:
        return f"{name} takes {shared} B of shared memory > {room} B of a block on {device.id}"
    return None


def _shapes(tiles: tuple[tuple[int, int], ...], stages) -> Iterator[backward_kernels.Shape]:
    return (backward_kernels.Shape(*tile, count) for tile, count in itertools.product(tiles, tuple(stages)))


def _least_shape() -> backward_kernels.Shape:
    return backward_kernels.Shape(_HELD[0], _STREAMED[0], _STAGES[0])


def _config(rows: backward_kernels.Shape, keys: backward_kernels.Shape) -> KernelConfig:
    return KernelConfig(
        "cuda", "fused", rows.held, rows.streamed, num_stages=rows.stages, kv_block_q=keys.streamed,
        kv_block_k=keys.held, kv_num_stages=keys.stages,
    )  # fmt: skip
