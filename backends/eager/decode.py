"""Decoding by the `gram` schedule: moments of one block of the cache after another, then a direct solve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Mapping

import torch
from torch import Tensor

from lla_compile import precision, storage
from lla_compile.gram import GramState
from lla_compile.lowering import lower

if TYPE_CHECKING:
    from lla_compile.backends.eager.evaluate import Value
    from lla_compile.plans import Plan


class GramExecutable:
    """A decoding plan of the eager backend; see :class:`lla_compile.backends.Executable`.

    Nothing is read back from a device, so that a GPU passes over all slots of the cache, or of the window, however
    short the sequences are. The direct solve counts as one iteration; its residual is that of its result.
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
        spec, q, ridge = self.plan.spec, inputs["q"], inputs["ridge"]
        wide = precision.is_wide(spec.dtype, spec.precision)
        q = q.to(torch.float64 if wide else storage.state_dtype(q.dtype))
        state = self._state(q, inputs)
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

    def _state(self, q: Tensor, inputs: Mapping[str, Value]) -> GramState:
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
        return GramState.merge([self._split(q, inputs, lengths, first, blocks) for blocks in splits or [range(1)]])

    def _split(self, q, inputs, lengths, first, blocks: range) -> GramState:
        state = None
        for start in blocks:
            block = self._block(q, inputs, lengths, first + start, min(blocks.step, blocks.stop - start))
            state = block if state is None else GramState.merge([state, block])
        return state

    def _block(self, q: Tensor, inputs: Mapping[str, Value], lengths: Tensor, first: Tensor, size: int) -> GramState:
        """The state of ``size`` slots of every sequence, from the slot ``first`` (B,) on."""
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
        return GramState.of(q, k, v, scale=inputs["scale"], mask=visible[:, None])
