"""An attention as launches to time: the forward pass, and forward with backward as a training step runs them."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import Tensor

from benchmarks.peers import Peer
from benchmarks.timing import Launch
from lla_compile import lla_attention


def lla(ridge: float | Tensor, precision: str) -> Peer:
    """Our own attention, called like a peer."""
    return Peer(lambda q, k, v: lla_attention(q, k, v, ridge, precision=precision))


def forward(peer: Peer, tensors: Sequence[Tensor]) -> Launch:
    """The forward pass on (B, H, N, D) tensors; it keeps what a backward pass needs if gradients are enabled."""
    own = _leaves(peer, tensors)
    return lambda: peer.from_own(peer.attend(*own))


def training(peer: Peer, tensors: Sequence[Tensor], grad_out: Tensor) -> Launch:
    """Forward and backward: returns the gradients of query, key and value, (B, H, N, D)."""
    own, grad = _leaves(peer, tensors), peer.to_own(grad_out)

    def step() -> list[Tensor]:
        return [peer.from_own(x) for x in torch.autograd.grad(peer.attend(*own), own, grad)]

    return step


def _leaves(peer: Peer, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    needs_grad = torch.is_grad_enabled()
    return tuple(peer.to_own(x).detach().requires_grad_(needs_grad) for x in tensors)
