"""Weighted means over one set of keys, and how those of several sets merge."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class MeanState(NamedTuple):
    """What queries have to know of a set of keys and values for Parallax: with p = softmax(scale q.k) over the set,

        probe_mean = sum_j p_j r.k_j      value_mean = sum_j p_j v_j      out = sum_j p_j (1 - r.k_j + probe_mean) v_j

    Softmax attention is r = 0. A set without keys has ``lse`` -inf and zeros for the rest.

    Attributes:
        lse: log sum_j exp(scale * q.k_j), natural, (B, Hq, N, 1).
        probe_mean: (B, Hq, N, 1).
        value_mean, out: (B, Hq, N, Dv).
    """

    lse: Tensor
    probe_mean: Tensor
    value_mean: Tensor
    out: Tensor

    @classmethod
    def of(cls, q: Tensor, r: Tensor | None, k: Tensor, v: Tensor, scale: float | Tensor, mask: Tensor) -> MeanState:
        """The state of keys (B, Hkv, M, D) and values (B, Hkv, M, Dv), in their type.

        ``mask`` (B, 1, N, M) is True where a query sees a key; what no query sees may hold NaN.
        """
        batch, heads, length, width = q.shape
        seen = mask.any(2).unsqueeze(-1)
        k, v = torch.where(seen, k, 0), torch.where(seen, v, 0)
        mask = mask.expand(batch, heads, length, k.shape[2]).reshape(batch, k.shape[1], -1, k.shape[2])

        def products(rows: Tensor) -> Tensor:
            """With every key; the queries of a group share theirs."""
            return rows.reshape(batch, k.shape[1], -1, width) @ k.mT

        scores = torch.where(mask, products(q * scale), -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        p = (scores - torch.where(lse > -torch.inf, lse, 0)).exp()
        value_mean = p @ v
        probe_mean, out = torch.zeros_like(lse), value_mean
        if r is not None:
            a = products(r)
            probe_mean = (p * a).sum(-1, keepdim=True)
            out = value_mean - (p * (a - probe_mean)) @ v
        return cls(*(x.reshape(batch, heads, length, -1) for x in (lse, probe_mean, value_mean, out)))

    def merge(self, other: MeanState) -> MeanState:
        """The state of the keys of both."""
        lse = torch.logaddexp(self.lse, other.lse)
        anchor = torch.where(lse > -torch.inf, lse, 0)
        states = [(state, (state.lse - anchor).exp()) for state in (self, other)]
        probe_mean = sum(weight * state.probe_mean for state, weight in states)
        value_mean = sum(weight * state.value_mean for state, weight in states)
        out = sum(
            weight * (state.out + (probe_mean - state.probe_mean) * state.value_mean) for state, weight in states
        )
        return MeanState(lse, probe_mean, value_mean, out)
