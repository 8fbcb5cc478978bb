"""What the precision tiers mean, as data: how operands of tile products are rounded, and the error that is allowed.

``fast`` rounds an operand once to the input type. ``accurate`` stands for it by a sum hi + lo of two values of that
type, at the price of a second product. Query, key and value are exact in both, and sums are kept in float32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FLOAT16_MAX = 65504.0

# float32 and float64 operands enter a product as they are; a backend picks tf32 or ieee products for float32.
_SPLIT_TERMS = {
    ("float16", "fast"): 1,
    ("bfloat16", "fast"): 1,
    ("float16", "accurate"): 2,
    ("bfloat16", "accurate"): 2,
}

# By phase: (smallest ridge, limit), largest ridge first. Under the last ridge the only promise is a finite result.
# The gradient of the ridge, u.s, carries the errors of two solves: for `fast` at ridge 0.1 it alone was measured at
# 1.3e-1 where those of query, key and value stay under 4e-2.
_ERROR_LIMITS = {
    "forward": {
        ("16-bit", "fast"): ((1.0, 8e-3), (0.1, 2.7e-2)),
        ("16-bit", "accurate"): ((0.1, 2.5e-3), (0.01, 5e-3)),
        # tf32: rounded within the product, so that nothing else knows of it.
        ("float32", "fast"): ((1.0, 8e-3), (0.1, 5e-2)),
        ("float32", "accurate"): ((0.1, 1e-5),),
        ("float64", "fast"): ((0.1, 1e-4),),
        ("float64", "accurate"): ((0.01, 1e-9),),
    },
    # `fast` rounds weighted keys once, which shows where few share the weight: 6.4e-3 was measured at 64 keys.
    "decode": {
        ("16-bit", "fast"): ((0.01, 1e-2),),
        ("16-bit", "accurate"): ((0.01, 2.5e-3),),
        ("float32", "fast"): ((0.1, 5e-2),),
        ("float32", "accurate"): ((0.1, 1e-5),),
        ("float64", "fast"): ((0.1, 1e-4),),
        ("float64", "accurate"): ((0.01, 1e-9),),
    },
    "backward": {
        ("16-bit", "fast"): ((1.0, 3e-2), (0.1, 2e-1)),
        ("16-bit", "accurate"): ((0.1, 5e-3),),
        ("float32", "fast"): ((1.0, 5e-2), (0.1, 3e-1)),
        ("float32", "accurate"): ((0.1, 5e-5),),
        ("float64", "fast"): ((0.1, 1e-3),),
        ("float64", "accurate"): ((0.1, 1e-8),),
    },
}


def split_terms(dtype: str, precision: str) -> int:
    """Values of the input type whose sum stands for one computed operand of a tile product."""
    return _SPLIT_TERMS.get((dtype, precision), 1)


def split_tol(dtype: str, precision: str) -> float:
    """Relative residual under which CG stops splitting the operands of its products; 0 where operands are one term.

    In bfloat16 the errors of output and gradients are those of splitting throughout, to two digits, at ridges from 1
    to 0.01; at 0.5 those of the gradients double at 0.01.
    """
    return 0.1 if split_terms(dtype, precision) > 1 else 0.0


def is_wide(dtype: str, precision: str) -> bool:
    """Whether products whose terms cancel are taken in float64: a 16-bit result does not show the difference."""
    return dtype == "float32" and precision == "accurate"


def weight_shift(dtype: str) -> int:
    """Weights ``exp2(score - lse)`` are multiplied by 2**shift before rounding, their sums by 2**-shift after.

    A weight is about 1/N. In float16 that is subnormal from N = 16384 on, and 2**6 leaves a factor of 1024 above the
    largest weight. Weights relative to the running maximum ("online" sweeps) need no shift.
    """
    return 6 if dtype == "float16" else 0


def terms_of(x: torch.Tensor, dtype: str, terms: int) -> list[torch.Tensor]:
    """``terms`` values of ``dtype`` whose sum stands for ``x``: its rounding, and that of what rounding lost.

    Args:
        x: operand in the accumulation type, any shape.
        dtype: the input type; "float32" and "float64" give ``x`` itself. float16 saturates at its largest value.
        terms: 1 or 2.
    """
    if dtype not in ("float16", "bfloat16"):
        return [x]
    import torch

    parts, rest = [], x
    for _ in range(terms):
        if dtype == "float16":
            rest = rest.clamp(-FLOAT16_MAX, FLOAT16_MAX)
        parts.append(rest.to(getattr(torch, dtype)))
        rest = rest - parts[-1].to(x.dtype)
    return parts


def round_operand(x: torch.Tensor, dtype: str, terms: int) -> torch.Tensor:
    """The value that the sum of :func:`terms_of` stands for, in the type of ``x``."""
    first, *others = (part.to(x.dtype) for part in terms_of(x, dtype, terms))
    return sum(others, first)


def error_limit(dtype: str, precision: str, ridge: float | None, phase: str = "forward") -> float:
    """Largest allowed ``||x - reference|| / ||reference||``; inf where only a finite result is promised.

    In phase "forward" ``x`` is the output, in "backward" each of the gradients. An operator without a ridge, None, is
    held to the limit of the largest.
    """
    kind = "16-bit" if dtype in ("float16", "bfloat16") else dtype
    ridge = math.inf if ridge is None else ridge
    return next((limit for floor, limit in _ERROR_LIMITS[phase][kind, precision] if ridge >= floor), math.inf)
