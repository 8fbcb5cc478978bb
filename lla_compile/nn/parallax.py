"""Parallax as a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lla_compile.nn.layer import AttentionLayer
from lla_compile.nn.operators import PARALLAX


class ProbeLinear(nn.Linear):
    """A linear map that starts as zero."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class ParallaxAttention(AttentionLayer):
    """Self-attention whose tokens bring the probe r that Local Linear Attention solves for (arXiv 2605.29157).

    What :func:`lla_compile.parallax_attention` is to :func:`lla_compile.lla_attention`, this is to
    :class:`LocalLinearAttention`. The probe is one more linear map of the token, rotated by the angles of the query. It
    starts as zero, so that the layer starts as softmax attention.

    Args:
        embed_dim, num_heads, options: all of :class:`LocalLinearAttention` but ``ridge``, ``initial_ridge``, ``cg_tol``
            and ``cg_max_iters``. ``bias`` is the probe's too.

    The state_dict has ``r_proj`` beside what :class:`LocalLinearAttention` lists, and no ``ridge``.

    Raises:
        ValueError: sizes do not divide, or the options do not fit.

    Example:
        >>> import torch
        >>> from lla_compile.nn import ParallaxAttention, RotaryEmbedding
        >>> layer = ParallaxAttention(64, 4, num_kv_heads=2, qk_norm=True, rotary=RotaryEmbedding(16))
        >>> layer(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    operator = PARALLAX

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        bias: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **options,
    ):
        super().__init__(embed_dim, num_heads, bias=bias, device=device, dtype=dtype, **options)
        self.r_proj = ProbeLinear(embed_dim, num_heads * self.head_dim, bias, device=device, dtype=dtype)

    def project(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> tuple[dict, Tensor, Tensor]:
        queries, k, v = super().project(x, angles)
        return queries | {"r": self._heads(self.r_proj(x), angles=angles)}, k, v
