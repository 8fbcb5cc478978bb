"""Held-out inputs: no trial is timed on them, and every result on them is held against a float64 reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Iterator, Mapping

import torch
from torch import Tensor

from lla_compile.autograd import gradients
from lla_compile.precision import error_limit
from lla_compile.reference import (
    lla_reference,
    lla_reference_backward,
    parallax_reference,
    parallax_reference_backward,
)
from lla_compile.spec import LLASpec
from lla_compile.tuner.errors import relative_error, relative_errors
from lla_compile.tuner.problem import BindForward, Case, Problem

# Taken off the length of the held-out inputs to leave ragged tiles behind: 1024 becomes the odd 999.
_RAGGED = 25

# Keys of the sequences of a ragged cache, beside as many as a key is wide and as many as there are slots: a single
# key's value comes back exactly, and up to the width of a key their covariance has no full rank.
_FEW_KEYS = (1, 2, 17)


@dataclass(frozen=True)
class HeldOut(Case):
    """A case with its references: the output, or every gradient."""

    @property
    def checked(self) -> tuple[str, ...]:
        """The outputs that have a reference."""
        return gradients(self.spec.op) if self.spec.phase == "backward" else ("out",)

    def reference(self, ridge: float | None) -> dict[str, Tensor]:
        """What ``checked`` should be, in float64; of dscale the sum over the rows. Computed once for each ridge."""
        if ridge not in self._references:
            self._references[ridge] = _reference(self.spec, self.inputs(ridge), self.seqlens)
        return self._references[ridge]

    def limit(self, ridge: float | None) -> float:
        """What no error may exceed."""
        return error_limit(self.spec.dtype, self.spec.precision, ridge, self.spec.phase)

    def errors(self, outputs: Mapping[str, Tensor], ridge: float | None) -> dict[str, float]:
        """:func:`relative_error` of every output; where lengths differ, of that of every sequence."""
        references = self.reference(ridge)
        if self.seqlens is None:
            return relative_errors(outputs, references)
        return {
            f"{name} of {length} keys": relative_error(x[sequence], references[name][sequence])
            for name, x in outputs.items()
            for sequence, length in enumerate(self.seqlens)
        }

    def worst(self, outputs: Mapping[str, Tensor], ridge: float | None) -> tuple[str, float]:
        """The output with the largest error, one that is not finite before all others, and its error."""
        errors = self.errors(outputs, ridge)
        return max(errors.items(), key=lambda item: item[1] if math.isfinite(item[1]) else math.inf)

    @cached_property
    def _references(self) -> dict[float | None, dict[str, Tensor]]:
        return {}


def held_out(problem: Problem, bind_forward: BindForward, seqlen: int, heads: int) -> tuple[HeldOut, ...]:
    """Held-out inputs of the key's own types and widths: one of at most ``seqlen`` keys, one shorter and ragged."""
    seqlen = min(seqlen, problem.spec.seqlen_k)
    heads = min(heads, problem.spec.batch_heads)
    if problem.spec.phase == "decode":
        return tuple(
            HeldOut(spec, problem.torch_device, "held out", bind_forward, seqlens)
            for spec, seqlens in _caches(problem.spec, seqlen, heads)
        )
    # A sequence of a few keys has gradients that vanish, whose relative error is noise.
    lengths = {seqlen, max(seqlen - _RAGGED, seqlen // 2 | 1)}
    specs = (
        replace(problem.spec, batch=1, num_heads=heads, num_kv_heads=heads, seqlen_q=length, seqlen_k=length)
        for length in sorted(lengths, reverse=True)
    )
    return tuple(HeldOut(spec, problem.torch_device, "held out", bind_forward) for spec in specs)


def _caches(spec: LLASpec, seqlen: int, heads: int) -> Iterator[tuple[LLASpec, tuple[int, ...] | None]]:
    """A full cache of ``seqlen`` slots, and one of an odd number of them whose sequences have lengths of their own."""
    kv_heads = max(1, heads // spec.group_size)
    spec = replace(spec, num_heads=kv_heads * spec.group_size, num_kv_heads=kv_heads)
    yield replace(spec, batch=1, seqlen_k=seqlen), None
    slots = max(seqlen - _RAGGED, seqlen // 2 | 1)
    lengths = tuple(min(length, slots) for length in (*_FEW_KEYS, spec.head_dim, slots))
    yield replace(spec, batch=len(lengths), seqlen_k=slots), lengths


def _reference(spec: LLASpec, inputs: Mapping, seqlens: tuple[int, ...] | None) -> dict[str, Tensor]:
    q, k, v = (inputs[name] for name in "qkv")
    if seqlens is not None:
        rows = [{name: x[i : i + 1] for name, x in inputs.items() if name in ("q", "r")} for i in range(len(seqlens))]
        parts = [inputs | row | {"k": k[i : i + 1, :, :n], "v": v[i : i + 1, :, :n]}
                 for i, (row, n) in enumerate(zip(rows, seqlens))]  # fmt: skip
        return {"out": torch.cat([_reference(spec, part, None)["out"] for part in parts])}
    options = {"scale": inputs["scale"], "is_causal": spec.is_causal, "window_size": spec.window_size}
    backward = spec.phase == "backward"
    if not spec.solves:
        tensors = q, inputs.get("r"), k, v
        if backward:
            return parallax_reference_backward(inputs["grad_out"], *tensors, **options)
        return {"out": parallax_reference(*tensors, **options)}
    tensors = q, k, v, inputs["ridge"]
    if backward:
        return dict(zip(gradients(spec.op), lla_reference_backward(inputs["grad_out"], *tensors, **options)))
    return {"out": lla_reference(*tensors, **options)}
