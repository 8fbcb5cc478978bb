"""Where a layer's ridge comes from: a number, one learned number a head, or the token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lla_compile.arguments import ridge_number

# A sigmoid underflows to 0, which no ridge may be.
SMALLEST = 1e-6


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


class FixedRidge(nn.Module):
    """One number for all heads and tokens, not learned and not in the state_dict."""

    def __init__(self, value: float = 1.0):
        super().__init__()
        self.value = ridge_number(value)

    def forward(self, x: Tensor) -> float:
        """The ridge, whatever the tokens x are."""
        return self.value

    def extra_repr(self) -> str:
        return f"{self.value:g}"


class HeadRidge(nn.Module):
    """One learned number for each head, ``exp(log_ridge)``.

    Args:
        num_heads: query heads Hq.
        initial: the ridge to start from.
        device: of the parameter, which is float32.
    """

    def __init__(self, num_heads: int, initial: float = 1.0, *, device: str | torch.device | None = None):
        super().__init__()
        self.initial = ridge_number(initial)
        self.log_ridge = nn.Parameter(torch.empty(num_heads, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.log_ridge, math.log(self.initial))

    def forward(self, x: Tensor) -> Tensor:
        """Ridges of tokens x (..., E): (..., Hq), at least float32."""
        return at_least_float32(self.log_ridge).exp().expand(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"{len(self.log_ridge)}, initial={self.initial:g}"


class TokenRidge(nn.Module):
    """A ridge for each head and token, ``sigmoid(W x + b)``, as in the appendix of arXiv 2510.01450.

    Args:
        embed_dim: width E of a token.
        num_heads: query heads Hq.
        device, dtype: of the linear map.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.proj = nn.Linear(embed_dim, num_heads, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Ridges of tokens x (..., E): (..., Hq), at least float32, from 1e-6 to 1."""
        return at_least_float32(self.proj(x)).sigmoid().clamp(min=SMALLEST)
