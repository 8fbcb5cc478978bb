"""Held-out inputs: no trial is timed on them, and every result on them is held against a float64 reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Mapping

from torch import Tensor

from lla_compile.autograd import GRADIENTS
from lla_compile.precision import error_limit
from lla_compile.reference import lla_reference, lla_reference_backward
from lla_compile.spec import LLASpec
from lla_compile.tuner.errors import relative_errors
from lla_compile.tuner.problem import BindForward, Case, Problem

# Taken off the length of the held-out inputs to leave ragged tiles behind: 1024 becomes the odd 999.
_RAGGED = 25


@dataclass(frozen=True)
class HeldOut(Case):
    """A case with its references: the output, or every gradient."""

    @property
    def checked(self) -> tuple[str, ...]:
        """The outputs that have a reference."""
        return ("out",) if self.spec.phase == "forward" else GRADIENTS

    def reference(self, ridge: float) -> dict[str, Tensor]:
        """What ``checked`` should be, in float64; of dscale the sum over the rows. Computed once for each ridge."""
        if ridge not in self._references:
            self._references[ridge] = _reference(self.spec, self.inputs(ridge))
        return self._references[ridge]

    def limit(self, ridge: float) -> float:
        """What no error may exceed."""
        return error_limit(self.spec.dtype, self.spec.precision, ridge, self.spec.phase)

    def errors(self, outputs: Mapping[str, Tensor], ridge: float) -> dict[str, float]:
        """:func:`relative_error` of every output."""
        return relative_errors(outputs, self.reference(ridge))

    def worst(self, outputs: Mapping[str, Tensor], ridge: float) -> tuple[str, float]:
        """The output with the largest error, one that is not finite before all others, and its error."""
        errors = self.errors(outputs, ridge)
        return max(errors.items(), key=lambda item: item[1] if math.isfinite(item[1]) else math.inf)

    @cached_property
    def _references(self) -> dict[float, dict[str, Tensor]]:
        return {}


def held_out(problem: Problem, bind_forward: BindForward, seqlen: int, heads: int) -> tuple[HeldOut, ...]:
    """Held-out inputs of the key's own types and widths: one of at most ``seqlen`` keys, one shorter and ragged."""
    seqlen = min(seqlen, problem.spec.seqlen_k)
    heads = min(heads, problem.spec.batch_heads)
    # A sequence of a few keys has gradients that vanish, whose relative error is noise.
    lengths = {seqlen, max(seqlen - _RAGGED, seqlen // 2 | 1)}
    specs = (
        replace(problem.spec, batch=1, num_heads=heads, num_kv_heads=heads, seqlen_q=length, seqlen_k=length)
        for length in sorted(lengths, reverse=True)
    )
    return tuple(HeldOut(spec, problem.torch_device, "held out", bind_forward) for spec in specs)


def _reference(spec: LLASpec, inputs: Mapping) -> dict[str, Tensor]:
    q, k, v, ridge = (inputs[name] for name in ("q", "k", "v", "ridge"))
    options = {"scale": inputs["scale"], "is_causal": spec.is_causal, "window_size": spec.window_size}
    if spec.phase == "forward":
        return {"out": lla_reference(q, k, v, ridge, **options)}
    return dict(zip(GRADIENTS, lla_reference_backward(inputs["grad_out"], q, k, v, ridge, **options)))
