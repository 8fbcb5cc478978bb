"""Local Linear Attention as a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lla_compile.nn.layer import AttentionLayer
from lla_compile.nn.operators import LLA
from lla_compile.nn.ridge import FixedRidge, HeadRidge, TokenRidge


class LocalLinearAttention(AttentionLayer):
    r"""Self-attention by local linear regression: what :func:`lla_compile.lla_attention` is to
    ``scaled_dot_product_attention``, this is to :class:`torch.nn.MultiheadAttention`.

    Queries, keys and values are linear maps of the tokens, as in Llama. The ridge :math:`\lambda` is one of three.

    Args:
        embed_dim: width E of a token.
        num_heads: query heads Hq.
        num_kv_heads: key and value heads Hkv, which divide Hq (grouped-query attention); Hq by default.
        head_dim: width D of a head; E / Hq by default.
        bias: of the q, k and v projections.
        out_bias: of the output projection; as ``bias`` by default.
        qk_norm: normalise queries and keys of each head by :class:`torch.nn.RMSNorm`, before they are rotated.
        norm_eps: of these norms.
        rotary: a :class:`RotaryEmbedding` that queries and keys are rotated by; None for no positions. Layers may share
            one.
        scale: factor of the scores, the bandwidth of the regression's weights; D**-0.5 by default.
        learn_scale: make its logarithm a parameter, ``log_scale``.
        is_causal: a token sees those before it and itself.
        window_size: number of tokens that a token sees, itself included.
        precision, backend: as in :func:`lla_compile.lla_attention`.
        device, dtype: of the parameters.
        ridge: "token", learned for each head and token as sigmoid(W x + b) in (0, 1); "head", one learned number a
            head, exp(log_ridge); or a number, which is not learned.
        initial_ridge: what ``ridge="head"`` starts from.
        cg_tol, cg_max_iters: of conjugate gradients, as in :func:`lla_compile.lla_attention`.

    The state_dict has ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``, and where asked for ``q_norm``, ``k_norm``,
    ``log_scale``, ``ridge.log_ridge`` or ``ridge.proj``.

    Raises:
        ValueError: sizes do not divide, or the options do not fit.

    Example:
        >>> import torch
        >>> from lla_compile.nn import LocalLinearAttention, RotaryEmbedding
        >>> layer = LocalLinearAttention(64, 4, num_kv_heads=2, rotary=RotaryEmbedding(16))
        >>> x = torch.randn(2, 10, 64)
        >>> layer(x).shape
        torch.Size([2, 10, 64])
        >>> cache = layer.new_cache(batch=2, capacity=32)
        >>> with torch.no_grad():
        ...     prompt, token = layer(x[:, :9], cache=cache), layer(x[:, 9:], cache=cache)
        >>> torch.allclose(torch.cat((prompt, token), 1), layer(x), atol=1e-4)
        True
    """

    operator = LLA

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        ridge: float | str = "token",
        initial_ridge: float = 1.0,
        cg_tol: float | None = None,
        cg_max_iters: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **options,
    ):
        super().__init__(embed_dim, num_heads, device=device, dtype=dtype, **options)
        self.cg_tol, self.cg_max_iters = cg_tol, cg_max_iters
        self.ridge: nn.Module
        if ridge == "token":
            self.ridge = TokenRidge(embed_dim, num_heads, device=device, dtype=dtype)
        elif ridge == "head":
            self.ridge = HeadRidge(num_heads, initial_ridge, device=device)
        elif isinstance(ridge, str):
            raise ValueError(f'ridge must be "token", "head" or a number, got {ridge!r}')
        else:
            self.ridge = FixedRidge(ridge)

    def options(self) -> dict:
        return super().options() | {"cg_tol": self.cg_tol, "cg_max_iters": self.cg_max_iters}

    def project(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> tuple[dict, Tensor, Tensor]:
        queries, k, v = super().project(x, angles)
        return queries | {"ridge": self.ridge(x)}, k, v
