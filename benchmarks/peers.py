"""Other people's kernels as launches: what PyTorch has, and what is installed beside it."""

from __future__ import annotations

import importlib
from typing import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import Launch

RIDGELESS = ("sdpa", "fla parallax")


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Launch:
    """Softmax attention of PyTorch: the floor, two tile products where LLA has five and more."""
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=True)


def flashlla(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ridge: float, cg_max_iters: int) -> Launch:
    """The LLA authors' kernels. They take (batch*heads, N, D) and autotune at the first call of a shape."""
    attention = _member("flashlla", "lla_attention")
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return lambda: attention(q, k, v, ridge_lambda=ridge, cg_max_iters=cg_max_iters)[None]


def parallax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Launch:
    """Parallax of flash-linear-attention: the nearest operator there, whose probe is an input instead of solved for."""
    attention = _member("fla.ops.parallax", "parallel_parallax")
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # (B, N, H, D)
    probe = q / q.shape[-1]
    return lambda: attention(q=q, r=probe, k=k, v=v)


def available(package: str) -> bool:
    """Whether a peer is installed at all; one that is there and fails is a result."""
    return importlib.util.find_spec(package) is not None


def _member(module: str, name: str) -> Callable:
    return getattr(importlib.import_module(module), name)
