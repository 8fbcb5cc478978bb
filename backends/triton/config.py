"""Heuristic default and search space of the Triton backend, side by side."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Mapping

from lla_compile.backends.triton.resources import infeasible, padded_width
from lla_compile.lowering import lower
from lla_compile.plans import KernelConfig

if TYPE_CHECKING:
    from lla_compile.devices import DeviceInfo
    from lla_compile.spec import LLASpec

# float32 `accurate` asks for a residual of 1e-6, which takes about twice the iterations of 1e-3. Past head_dim 128 the
# slowest rows at ridge 0.1 take up to half as many again.
_CG_MAX_ITERS = {"float16": 32, "bfloat16": 32, "float32": 64}
_MANY_DIMS = 128

# (block_q, block_k, num_warps, num_stages), best first; the first that fits is taken. 64 x 64 with 4 warps won at
# head_dim 64 on Hopper. From head_dim 128 on the row state does not fit in registers: block_k 32 leaves room in the
# first-level cache to park it. The rest is for float32, wider heads and small shared memory.
_PREFERENCE = (
    (64, 64, 4, 3),
    (64, 64, 4, 2),
    (64, 32, 4, 3),
    (64, 32, 4, 2),
    (64, 64, 8, 2),
    (64, 64, 8, 1),
    (32, 32, 2, 2),
    (32, 32, 2, 1),
    (16, 32, 1, 1),
    (16, 16, 1, 1),
)
_WIDE_PREFERENCE = (_PREFERENCE[2], *_PREFERENCE)
_WIDE = 128

# The same of the sweep that holds keys, which has two accumulators and four scores: a quarter of the rows of query.
_KEYS_PREFERENCE = (
    (32, 64, 4, 3),
    (32, 64, 4, 2),
    (16, 64, 4, 2),
    (16, 64, 4, 1),
    (16, 32, 2, 1),
    (16, 16, 1, 1),
)
_WIDE_KEYS_PREFERENCE = ((16, 64, 4, 2), *_KEYS_PREFERENCE)


# Operators that solve nothing have no row state to park: their forward sweep has two accumulators and two scores, the
# one of their backward pass that holds rows two and three. Rows of two warpgroups share a key tile.
# Where operands come through registers, square tiles of that size spill.
_SQUARE = (128, 128, 8, 3)
_MEAN_PREFERENCE = {
    ("forward", False): (_SQUARE, (64, 64, 4, 3), (128, 64, 8, 3)),
    ("forward", True): ((128, 64, 8, 3), (64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 3)),
    ("backward", False): ((64, 64, 4, 3),),
    ("backward", True): ((64, 32, 4, 3),),
}
# Past 64 dimensions the sums, the scores and the branch that rescales spill on sm_100 with 64 keys a tile.
_SM100_WIDE_FORWARD = ((128, 32, 8, 3), (64, 32, 4, 3))
_SHARED_ROWS = ((32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1))  # of heads past 128, whose accumulators need the warps
_MEAN_KEYS_PREFERENCE = ((32, 64, 4, 3),)


def default_config(spec: LLASpec, device: DeviceInfo) -> KernelConfig:
    """The first preferred shape that the device can hold, `fused` before `split`."""
    wide = max(padded_width(spec.head_dim), padded_width(spec.head_dim_v)) >= _WIDE
    shapes = _WIDE_PREFERENCE if wide else _PREFERENCE
    keys_shapes = _WIDE_KEYS_PREFERENCE if wide else _KEYS_PREFERENCE
    if not spec.solves:
        own = (shape for shape in _MEAN_PREFERENCE[spec.phase, wide] if shape != _SQUARE or _has_warpgroups(device))
        if wide and spec.phase == "forward" and device.compute_capability == "10.0":
            own = _SM100_WIDE_FORWARD
        shapes = (*own, *shapes[:-1], *_SHARED_ROWS, shapes[-1])
        keys_shapes = (*_MEAN_KEYS_PREFERENCE, *keys_shapes)
    if not _holds_keys(spec):
        keys_shapes = ((None,) * 4,)
    for schedule, keys_shape, shape in itertools.product(("fused", "split"), keys_shapes, shapes):
        config = KernelConfig("triton", schedule, shape[0], shape[1], _cg_max_iters(spec), *shape[2:], *keys_shape)
        if infeasible(spec, config, device) is None:
            break
    return config


def _has_warpgroups(device: DeviceInfo) -> bool:
    return 9.0 <= float(device.compute_capability or 0) < 12.0


def _cg_max_iters(spec: LLASpec) -> int | None:
    if not spec.solves:
        return None
    cg_max_iters = _CG_MAX_ITERS[spec.dtype]
    return cg_max_iters + cg_max_iters // 2 if spec.head_dim > _MANY_DIMS else cg_max_iters


def _holds_keys(spec: LLASpec) -> bool:
    return any(sweep.holds == "keys" for sweep in lower(spec.op, spec.phase).sweeps)


def search_space(spec: LLASpec, device: DeviceInfo) -> Mapping[str, tuple]:
    """Values worth trying. Where a warp owns 16 rows by itself, smaller held tiles are an option."""
    warpgroups = _has_warpgroups(device)
    space = {
        # One sweep that holds rows is one launch either way.
        "schedule": ("fused", "split") if spec.solves or _holds_keys(spec) else ("fused",),
        "block_q": (64, 128) if warpgroups else (16, 32, 64, 128),
        "block_k": (32, 64, 128),
        "num_warps": (4, 8) if warpgroups else (1, 2, 4, 8),
        "num_stages": (1, 2, 3, 4),
        "cg_max_iters": ((48, 64, 96) if spec.dtype == "float32" else (24, 32, 48)) if spec.solves else (None,),
    }
    if _holds_keys(spec):
        space |= {
            "kv_block_q": (16, 32, 64),
            "kv_block_k": (64, 128) if warpgroups else (16, 32, 64, 128),
            "kv_num_warps": (4, 8) if warpgroups else (1, 2, 4, 8),
            "kv_num_stages": (1, 2, 3),
        }
    return space
