"""How far a result is from its reference: one measure for trials, benchmarks and tests."""

from __future__ import annotations

from typing import Mapping

from torch import Tensor


def relative_error(x: Tensor, reference: Tensor) -> float:
    """||x - reference|| / ||reference|| in float64; absolute if the norm is zero, NaN or inf if x is not finite.

    The gradient of the scale is a single number, a sum over all queries of contributions of either sign, and may come
    out near zero however large they are: relative to itself it has no error that a limit could be set for. Where
    ``x`` is the contributions to a 0-dim reference, the error of their sum is divided by their norm instead. If each
    of them is off by a share e of its own size, independently of the others, that is about e, as it would be for a
    vector of them.
    """
    reference = reference.double()
    x = x.to(reference)
    if x.dim() and not reference.dim():
        difference, norm = (x.sum() - reference).abs(), x.norm()
    else:
        difference, norm = (x - reference).norm(), reference.norm()
    return (difference / norm if norm > 0 else difference).item()


def relative_errors(outputs: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> dict[str, float]:
    """:func:`relative_error` of every output by name."""
    return {name: relative_error(x, references[name]) for name, x in outputs.items()}
