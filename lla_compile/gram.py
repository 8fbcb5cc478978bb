"""Attention over keys that lie in several parts: a state of fixed size for each part, which merge exactly.

For each query, Local Linear Attention needs of the keys and values only moments under its softmax weights p. One pass
over the keys gives them, where conjugate gradients (CG) on the keys themselves takes one pass for every iteration. The
moments of two sets of keys give those of their union: a cache can be cut into splits, into pages or over devices::

    parts = [GramState.of(q.to(k.device), k, v).to(q.device) for k, v in caches]
    o = GramState.merge(parts).attend(q, ridge)
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from lla_compile import storage


class GramState(NamedTuple):
    r"""What queries have to know of a set of keys and values: with p = softmax(scale * q.k) over that set,

    .. math::
        \bar k = \sum_j p_j k_j \quad \bar v = \sum_j p_j v_j \quad
        C = \sum_j p_j (k_j - \bar k)(k_j - \bar k)^T \quad G = \sum_j p_j (k_j - \bar k)(v_j - \bar v)^T

    The moments are centred and normalised, so that nothing cancels when states merge, wherever the keys lie. A set
    without keys has ``lse`` -inf and zeros for the rest.

    A kernel that multiplies in a 16-bit type rounds the weighted keys x_j = round(p_j (k_j - c)), c being any vector
    near the keys, and takes E = sum_j x_j, C = sum_j x_j k_j^T - E kbar^T and G = sum_j x_j v_j^T - E vbar^T of what it
    has rounded. C is then not quite symmetric: its rows, as those of G, belong to the rounded side. Used as
    (C^T + ridge I) u = kbar - q and o = vbar - G^T u, the rounding does no harm however small the ridge, since
    X (Y^T X + ridge I)^-1 = (X Y^T + ridge I)^-1 X. With C symmetrised or not transposed the same errors are multiplied
    by ||u||, about ||q|| / ridge where there are fewer keys than dimensions.

    Attributes:
        lse: log sum_j exp(scale * q.k_j), natural, (B, Hq, N).
        key_mean: kbar, (B, Hq, N, D).
        value_mean: vbar, (B, Hq, N, Dv).
        key_covariance: C, (B, Hq, N, D, D).
        key_value_covariance: G, (B, Hq, N, D, Dv).

    Example:
        >>> import torch
        >>> from lla_compile import GramState, lla_attention
        >>> q, k, v = torch.randn(3, 1, 2, 40, 8).unbind()
        >>> parts = [GramState.of(q, *kv) for kv in zip(k.split(16, dim=2), v.split(16, dim=2))]
        >>> o = GramState.merge(parts).attend(q, ridge=0.5)
        >>> torch.allclose(o, lla_attention(q, k, v, ridge=0.5, is_causal=False), atol=1e-4)
        True
    """

    lse: Tensor
    key_mean: Tensor
    value_mean: Tensor
    key_covariance: Tensor
    key_value_covariance: Tensor

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, *, scale: float | Tensor | None = None, mask: Tensor | None = None
    ) -> GramState:
        """The state of dense keys and values, in float32, or in float64 for float64 inputs.

        Its memory is that of N * M * D numbers for each head: cut long sequences into parts.

        Args:
            q: queries (B, Hq, N, D), any float type.
            k: keys (B, Hkv, M, D); Hq is a multiple of Hkv (grouped-query attention). M may be 0.
            v: values (B, Hkv, M, Dv).
            scale: factor of the scores; None means D**-0.5.
            mask: True where a query sees a key, bool, broadcastable to (B, Hq, N, M). What no query sees may hold NaN.
        """
        batch, heads, length, width = q.shape
        dtype = storage.state_dtype(q.dtype)
        scale = width**-0.5 if scale is None else scale
        q, k, v = (x.to(dtype) for x in (q, k, v))
        q = (scale * q).reshape(batch, k.shape[1], -1, width)  # the queries of a group share their keys
        seen = torch.ones_like(k[..., :1], dtype=torch.bool)
        if mask is not None:
            mask = mask.expand(batch, heads, length, k.shape[2]).reshape(*q.shape[:3], -1)
            seen = mask.any(2).unsqueeze(-1)
            k, v = torch.where(seen, k, 0), torch.where(seen, v, 0)

        # Any vector near the keys keeps the digits of what is centred at it; here their mean.
        count = seen.sum(2, keepdim=True).clamp(min=1)
        key_center, value_center = k.sum(2, keepdim=True) / count, v.sum(2, keepdim=True) / count
        k, v = k - key_center, v - value_center
        scores = q @ k.mT
        if mask is not None:
            scores = torch.where(mask, scores, -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        has_keys = lse > -torch.inf
        p = (scores - torch.where(has_keys, lse, 0)).exp()
        key_mean, value_mean = p @ k, p @ v

        weighted = p.unsqueeze(-2) * (k.mT.unsqueeze(2) - key_mean.unsqueeze(-1))  # (B, Hkv, queries, D, M)
        columns, means = torch.cat([k, v], -1), torch.cat([key_mean, value_mean], -1)
        moments = (weighted.flatten(2, 3) @ columns).unflatten(2, weighted.shape[2:4])
        moments = moments - _outer(weighted.sum(-1), means)
        tensors = (
            (lse + q @ key_center.mT).squeeze(-1),
            torch.where(has_keys, key_mean + key_center, 0),
            torch.where(has_keys, value_mean + value_center, 0),
            *moments.split([width, v.shape[-1]], -1),
        )
        return cls(*(x.reshape(batch, heads, length, *x.shape[3:]) for x in tensors))

    @classmethod
    def merge(cls, states: Sequence[GramState]) -> GramState:
        """The state of all the keys of ``states``, which share their queries and device, in any order."""
        lse = torch.stack([state.lse for state in states]).logsumexp(0)
        anchor = torch.where(lse > -torch.inf, lse, 0)
        weights = [(state.lse - anchor).exp().unsqueeze(-1) for state in states]

        def mean(tensors) -> Tensor:
            return sum(weight * x for weight, x in zip(weights, tensors))

        key_mean, value_mean = mean(s.key_mean for s in states), mean(s.value_mean for s in states)
        key_covariance = key_value_covariance = 0
        for weight, state in zip(weights, states):
            weight = weight.unsqueeze(-1)
            offset, value_offset = state.key_mean - key_mean, state.value_mean - value_mean
            key_covariance += weight * (state.key_covariance + _outer(offset, offset))
            key_value_covariance += weight * (state.key_value_covariance + _outer(offset, value_offset))
        return cls(lse, key_mean, value_mean, key_covariance, key_value_covariance)

    def to(self, *args, **options) -> GramState:
        """The state on another device or in another type, as ``torch.Tensor.to`` moves each of its tensors."""
        return GramState(*(x.to(*args, **options) for x in self))

    def solve(self, q: Tensor, ridge: float | Tensor) -> Tensor:
        """The probe u, (C^T + ridge I) u = kbar - q, by a direct solve that the host does not wait for.

        Args:
            q: the queries of the state, (B, Hq, N, D).
            ridge: positive; a number or a tensor broadcastable to (B, Hq, N).
        """
        matrix = self.key_covariance.mT.clone()
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        diagonal += ridge.unsqueeze(-1) if isinstance(ridge, Tensor) and ridge.dim() else ridge
        right = self.key_mean - q.to(self.key_mean.dtype)
        return torch.linalg.solve_ex(matrix, right.unsqueeze(-1))[0].squeeze(-1)

    def answer(self, probe: Tensor) -> Tensor:
        """o = vbar - G^T u for a probe u (B, Hq, N, D); zeros for a query without keys."""
        out = self.value_mean - (self.key_value_covariance.mT @ probe.unsqueeze(-1)).squeeze(-1)
        return torch.where(self.lse.unsqueeze(-1) > -torch.inf, out, 0)

    def attend(self, q: Tensor, ridge: float | Tensor) -> Tensor:
        """The output of Local Linear Attention (B, Hq, N, Dv), in the type of the state; arguments of :meth:`solve`."""
        return self.answer(self.solve(q, ridge))


def _outer(x: Tensor, y: Tensor) -> Tensor:
    return x.unsqueeze(-1) * y.unsqueeze(-2)
