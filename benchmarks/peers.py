"""Other people's attention as it wants to be called: what PyTorch has, and what is installed beside it."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Peer:
    """One attention and its layout.

    Attributes:
        attend: (q, k, v) -> output, all in its own layout; differentiable.
        to_own: a (B, H, N, D) tensor in that layout, contiguous; B is 1 if the layout has no batch.
        from_own: back to (B, H, N, D).
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    to_own: Callable[[Tensor], Tensor] = lambda x: x
    from_own: Callable[[Tensor], Tensor] = lambda x: x


def sdpa() -> Peer:
    """Softmax attention of PyTorch: the floor, two tile products where LLA has five and more."""
    return Peer(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True))


def flashlla(ridge: float, cg_max_iters: int, device: torch.device) -> Peer:
    """The LLA authors' kernels. They take (batch*heads, N, D) and autotune at the first call of a length.

    The ridge goes in as a float32 tensor: a number would be rounded to the type of q, and copied to the device in
    every call.
    """
    attention = _member("flashlla", "lla_attention")
    ridge_lambda = torch.tensor(ridge, dtype=torch.float32, device=device)
    return Peer(
        lambda q, k, v: attention(q, k, v, ridge_lambda=ridge_lambda, cg_max_iters=cg_max_iters),
        to_own=lambda x: x.flatten(0, 1),
        from_own=lambda x: x[None],
    )


def parallax(probe: Tensor) -> Peer:
    """Parallax of flash-linear-attention: the nearest operator there, whose probe is an input instead of solved for."""
    attention = _member("fla.ops.parallax", "parallel_parallax")

    r = _swapped(probe)
    return Peer(lambda q, k, v: attention(q=q, r=r, k=k, v=v), _swapped, _swapped)


def fla_parallax() -> Peer:
    """The same with the probe as an argument that has a gradient: (q, r, k, v) -> output."""
    attention = _member("fla.ops.parallax", "parallel_parallax")
    return Peer(attention, _swapped, _swapped)


def _swapped(x: Tensor) -> Tensor:
    """(B, H, N, D) to (B, N, H, D) and back."""
    return x.transpose(1, 2).contiguous()


def available(package: str) -> bool:
    """Whether a peer is installed at all; one that is there and fails is a result."""
    return importlib.util.find_spec(package) is not None


def _member(module: str, name: str) -> Callable:
    return getattr(importlib.import_module(module), name)
