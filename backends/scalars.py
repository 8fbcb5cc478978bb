"""Scale, and the ridge where there is one, as kernels take them: a number, or a pointer in whose place the number is not read."""

from __future__ import annotations

from typing import Mapping, NamedTuple

import torch


class Scalars(NamedTuple):
    """Arguments of a launch; a pointer is None where the number counts.

    Attributes:
        ridge_strides: of the (B, Hq, N) view that ``ridge_ptr`` is.
    """

    ridge_ptr: torch.Tensor | None
    ridge: float
    ridge_strides: tuple[int, int, int]
    scale_ptr: torch.Tensor | None
    scale: float


def scalars_of(inputs: Mapping[str, torch.Tensor | float]) -> Scalars:
    """The scalars among an executable's inputs, tensors in float32; no operator without a ridge reads its place."""
    ridge, scale = inputs.get("ridge", 1.0), inputs["scale"]
    ridge_ptr, ridge_strides, scale_ptr = None, (0, 0, 0), None
    if isinstance(ridge, torch.Tensor):
        ridge_ptr = ridge.to(torch.float32).expand(inputs["q"].shape[:3])
        ridge, ridge_strides = 1.0, ridge_ptr.stride()
    if isinstance(scale, torch.Tensor):
        scale_ptr, scale = scale.to(torch.float32), 1.0
    elif scale <= 0 and "ridge" not in inputs:  # kernels of operators that solve nothing take positive numbers
        scale_ptr, scale = inputs["q"].new_full((), scale, dtype=torch.float32), 1.0
    return Scalars(ridge_ptr, ridge, ridge_strides, scale_ptr, scale)
