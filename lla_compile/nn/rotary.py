"""Rotary position embedding (arXiv 2104.09864), in the layout of Llama: pairs are half the rotated width apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the angles that queries and keys are rotated by.

    Pair i of the width R is rotated by ``position * base ** (-2 i / R)``. Nothing is learned or saved.

    Args:
        dim: rotated width R, even and at most the head_dim; the rest of a head is left as it is.
        base: of the frequencies.
        inv_freq: frequencies (R / 2,) to use in place of those, for the scaled variants.
        attention_scaling: factor of both, for variants that have one.
        device: of the frequencies.

    Raises:
        ValueError: ``dim`` is odd or not positive, or ``inv_freq`` has another shape.

    Example:
        >>> import torch
        >>> from lla_compile.nn import RotaryEmbedding
        >>> cos, sin = RotaryEmbedding(8)(torch.arange(5))
        >>> cos.shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        *,
        inv_freq: Tensor | None = None,
        attention_scaling: float = 1.0,
        device: str | torch.device | None = None,
    ):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be even and positive, got {dim}")
        if inv_freq is None:
            inv_freq = base ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
        elif inv_freq.shape != (dim // 2,):
            raise ValueError(f"inv_freq must have shape ({dim // 2},), got {tuple(inv_freq.shape)}")
        self.dim, self.base, self.attention_scaling = dim, base, attention_scaling
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions (...): float32 (..., dim), both halves alike."""
        with torch.autocast(position_ids.device.type, enabled=False):
            angles = position_ids[..., None].float() * self.inv_freq.float()
            angles = torch.cat((angles, angles), dim=-1)
            return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    def _apply(self, fn, recurse: bool = True):
        """Moved as the other modules, but kept in float32: rounded frequencies are wrong angles at large positions."""
        kept = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != kept.dtype:
            self.inv_freq = kept.to(self.inv_freq.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base:g}"


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` (..., N, H, D) rotated by angles (..., N, R), in the dtype of x; the last D - R of a head stay."""
    rotated, kept = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated.to(x.dtype), kept), dim=-1)
