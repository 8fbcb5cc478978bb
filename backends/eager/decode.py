"""Decoding, one block of the cache after another: moments and a direct solve, or weighted means."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Iterator, Mapping

import torch
from torch import Tensor

from lla_compile import precision, storage
from lla_compile.backends.eager.mean_state import MeanState
from lla_compile.gram import GramState
from lla_compile.lowering import lower

if TYPE_CHECKING:
    from lla_compile.backends.eager.evaluate import Value
    from lla_compile.plans import Plan


class _DecodeExecutable:
    """A decoding plan of the eager backend; see :class:`lla_compile.backends.Executable`.

    Nothing is read back from a device, so that a GPU passes over all slots of the cache, or of the window, however
    short the sequences are.
    """

    workspace_numel = 0

    def __init__(self, plan: Plan):
        self.plan = plan

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Value], wanted: tuple[str, ...]) -> dict[str, Tensor]:
        spec = self.plan.spec
        q = inputs["q"]
        with torch.autocast(q.device.type, enabled=False):
            computed = self._compute(inputs)
        program, results = lower(spec.op, spec.phase), {}
        for name in wanted:
            layout = storage.layout(program, name, q, inputs["k"], inputs["v"], spec.precision, packed=False)
            results[name] = inputs[name] if name in inputs else layout.empty(q)
            results[name].copy_(computed[name])
        return results

    def _compute(self, inputs: Mapping[str, Value]) -> dict[str, Tensor]:
        """Every output, in the accumulation type."""
        raise NotImplementedError

    def _wide(self, q: Tensor) -> Tensor:
        """The queries in the type of sums."""
        spec = self.plan.spec
        wide = precision.is_wide(spec.dtype, spec.precision)
        return q.to(torch.float64 if wide else storage.state_dtype(q.dtype))

    def _parts(self, q: Tensor, inputs: Mapping[str, Value]) -> Iterator[Iterator[tuple[Tensor, Tensor, Tensor]]]:
        """For every part of the keys, in turn: keys, values (B, Hkv, slots, width) and mask of one block after another."""
        spec, config = self.plan.spec, self.plan.config
        lengths = inputs["seqlens"]
        if lengths is None:
            lengths = torch.full((spec.batch,), spec.seqlen_k, device=q.device)
        lengths = lengths.long().clamp(0, spec.seqlen_k)
        first, span = torch.zeros_like(lengths), spec.seqlen_k
        if spec.window_size is not None:
            span = min(span, spec.window_size + spec.seqlen_q - 1)
            first = (lengths - span).clamp(min=0)
        if lengths.device.type == "cpu":
            span = min(span, int(lengths.max()))
        size = -(-span // (config.num_splits or 1))
        splits = [range(start, min(start + size, span), config.block_k) for start in range(0, span, max(size, 1))]
        for blocks in splits or [range(1)]:
            yield (
                self._block(q, inputs, lengths, first + start, min(blocks.step, blocks.stop - start)) for start in blocks
            )

    def _block(self, q: Tensor, inputs: Mapping[str, Value], lengths: Tensor, first: Tensor, size: int) -> tuple:
        """``size`` slots of every sequence, from the slot ``first`` (B,) on."""
        spec = self.plan.spec
        slots = first[:, None] + torch.arange(size, device=q.device)
        positions = lengths[:, None] - spec.seqlen_q + torch.arange(spec.seqlen_q, device=q.device)
        distance = positions[:, :, None] - slots[:, None, :]
        visible = distance >= 0
        if spec.window_size is not None:
            visible &= distance < spec.window_size
        slots = torch.where(visible.any(1), slots, 0)
        if spec.page_size is None:
            page = torch.arange(spec.batch, device=q.device)[:, None]  # a dense cache is one page for each sequence
        else:
            page = inputs["block_table"].gather(1, slots // spec.page_size).long()
            page = torch.where(visible.any(1), page, 0)
            slots = slots % spec.page_size
        k, v = (inputs[name][page, :, slots].transpose(1, 2).to(q.dtype) for name in ("k", "v"))
        return k, v, visible[:, None]


class GramExecutable(_DecodeExecutable):
    """The `gram` schedule. The direct solve counts as one iteration; its residual is that of its result."""

    def _compute(self, inputs: Mapping[str, Value]) -> dict[str, Tensor]:
        q, ridge = self._wide(inputs["q"]), inputs["ridge"]
        scale = inputs["scale"]
        parts = (
            functools.reduce(_merge, (GramState.of(q, k, v, scale=scale, mask=mask) for k, v, mask in blocks))
            for blocks in self._parts(q, inputs)
        )
        state = GramState.merge(list(parts))
        ridge = ridge.to(q.dtype) if isinstance(ridge, Tensor) else ridge
        right, probe = state.key_mean - q, state.solve(q, ridge)
        image = (state.key_covariance.mT @ probe.unsqueeze(-1)).squeeze(-1)
        image = image + (ridge.unsqueeze(-1) if isinstance(ridge, Tensor) else ridge) * probe
        norm = right.norm(dim=-1)
        solved = (state.lse > -torch.inf) & (norm > 0)
        return {
            "out": state.answer(probe),
            "iterations": solved,
            "final_residual": torch.where(solved, (image - right).norm(dim=-1) / norm, 0),
        }


def _merge(state: GramState, block: GramState) -> GramState:
    return GramState.merge([state, block])


class MeanExecutable(_DecodeExecutable):
    """The `fused` schedule of operators that solve nothing: weighted means of one block after another."""

    def _compute(self, inputs: Mapping[str, Value]) -> dict[str, Tensor]:
        q, scale = self._wide(inputs["q"]), inputs["scale"]
        r = self._wide(inputs["r"]) if "r" in inputs else None
        blocks = itertools.chain.from_iterable(self._parts(q, inputs))
        states = (MeanState.of(q, r, k, v, scale, mask) for k, v, mask in blocks)
        return {"out": functools.reduce(MeanState.merge, states).out}
