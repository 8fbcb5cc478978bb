"""What the layers share: projections to heads, positions, and one forward for training, prompts and decoding."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from lla_compile.arguments import dtype_name
from lla_compile.kv_cache import KVCache
from lla_compile.nn.operators import Operator
from lla_compile.nn.ridge import at_least_float32
from lla_compile.nn.rotary import RotaryEmbedding, apply_rotary
from lla_compile.spec import MAX_DECODE_QUERIES


class AttentionLayer(nn.Module):
    """Self-attention with an operator of the family; :class:`LocalLinearAttention` lists the arguments."""

    operator: ClassVar[Operator]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        rotary: RotaryEmbedding | None = None,
        scale: float | None = None,
        learn_scale: bool = False,
        is_causal: bool = True,
        window_size: int | None = None,
        precision: str = "accurate",
        backend: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"embed_dim must be a multiple of num_heads where head_dim is None, got {embed_dim} and {num_heads}"
                )
            head_dim = embed_dim // num_heads
        if rotary is not None and rotary.dim > head_dim:
            raise ValueError(f"rotary must rotate at most the head_dim {head_dim}, got {rotary.dim}")
        if window_size is not None and not is_causal:
            raise ValueError("window_size needs is_causal=True")
        self.embed_dim, self.head_dim = embed_dim, head_dim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.is_causal, self.window_size = is_causal, window_size
        self.precision, self.backend = precision, backend
        self.scale = head_dim**-0.5 if scale is None else scale
        factory = {"device": device, "dtype": dtype}
        out_bias = bias if out_bias is None else out_bias
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias, **factory)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias, **factory)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias, **factory)
        self.o_proj = nn.Linear(num_heads * head_dim, embed_dim, out_bias, **factory)
        self.q_norm = nn.RMSNorm(head_dim, norm_eps, **factory) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, norm_eps, **factory) if qk_norm else None
        self.rotary = rotary
        self.register_parameter("log_scale", None)
        if learn_scale:
            self.log_scale = nn.Parameter(torch.tensor(math.log(self.scale), dtype=torch.float32, device=device))

    def options(self) -> dict:
        """What every call of the operator gets beside its operands, but for ``is_causal``."""
        return {
            "scale": self.scale if self.log_scale is None else at_least_float32(self.log_scale).exp(),
            "window_size": self.window_size,
            "precision": self.precision,
            "backend": self.backend,
        }

    def project(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> tuple[dict, Tensor, Tensor]:
        """Operands of tokens x (..., N, E): those of query rows by name, keys and values.

        Args:
            x: tokens.
            angles: cosines and sines (..., N, R) to rotate by, or None.

        Returns:
            ``q`` and what else has the operator's name (..., N, Hq, D) or (..., N, Hq), keys and values
            (..., N, Hkv, D).
        """
        q = self._heads(self.q_proj(x), self.q_norm, angles)
        k = self._heads(self.k_proj(x), self.k_norm, angles)
        return {"q": q}, k, self._heads(self.v_proj(x))

    def forward(
        self,
        x: Tensor,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Attend tokens to themselves and, with a cache, to those before.

        With an empty ``cache``, ``x`` is the prompt: it is attended as without, and its keys and values are stored.
        Later calls append their tokens and attend over the cache, 16 at a time. There a gradient is refused.

        Args:
            x: tokens (B, N, E), or with ``cu_seqlens`` packed sequences (total, E).
            position_ids: integers (N,) or (B, N), or (total,), for the rotary embedding. By default a sequence starts
                at 0, and what follows a cache goes on from its ``seqlens``.
            cu_seqlens: int32 (sequences + 1), rising from 0 to total: where packed sequences start and end.
            cache: of B sequences, this layer's own, made by :meth:`new_cache`.
            lengths: tokens of each prompt, integers (B,), if ``x`` is padded at its end. Rows of the output that
                belong to padding mean nothing.

        Returns:
            (B, N, E) or (total, E), in the dtype of x under the usual rules of autocast.

        Raises:
            TypeError, ValueError, NotImplementedError: as the operator does, and if arguments do not go together.
        """
        self._check(x, cu_seqlens, cache, lengths)
        if position_ids is None and self.rotary is not None:
            position_ids = _positions(x, cu_seqlens, cache)
        queries, k, v = self.project(x, None if self.rotary is None else self.rotary(position_ids))
        options = self.options()
        if cu_seqlens is not None:
            ends = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
            out = self.operator.varlen(**queries, k=k, v=v, **ends, is_causal=self.is_causal, **options)
            return self.o_proj(out.flatten(-2))
        queries, k, v = heads_first(queries), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None and not cache.is_empty:
            out = self._decode(queries, k, v, cache, options)
        else:
            out = self.operator.attention(**queries, k=k, v=v, is_causal=self.is_causal, **options)
            if cache is not None:
                cache.append(*(y.detach().to(cache.k.dtype) for y in (k, v)), lengths)
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def new_cache(self, batch: int, capacity: int, *, page_size: int | None = None) -> KVCache:
        """A cache of ``batch`` sequences of at most ``capacity`` tokens, of the weights' dtype and on their device."""
        weight = self.k_proj.weight
        return KVCache(
            batch,
            self.num_kv_heads,
            capacity,
            self.head_dim,
            page_size=page_size,
            dtype=weight.dtype,
            device=weight.device,
        )

    def extra_repr(self) -> str:
        window = "" if self.window_size is None else f", window_size={self.window_size}"
        return (
            f"{self.embed_dim}, heads={self.num_heads}/{self.num_kv_heads}, head_dim={self.head_dim}, "
            f"is_causal={self.is_causal}{window}, precision={self.precision!r}"
        )

    def _heads(self, y: Tensor, norm: nn.Module | None = None, angles: tuple[Tensor, Tensor] | None = None) -> Tensor:
        y = y.unflatten(-1, (-1, self.head_dim))
        y = y if norm is None else norm(y)
        return y if angles is None else apply_rotary(y, *angles)

    def _decode(self, queries: dict, k: Tensor, v: Tensor, cache: KVCache, options: dict) -> Tensor:
        dtype, outs = cache.k.dtype, []
        queries = queries | {name: queries[name].to(dtype) for name in queries.keys() & {"q", "r"}}
        k, v = k.to(dtype), v.to(dtype)
        for start in range(0, k.shape[2], MAX_DECODE_QUERIES):
            part = slice(start, start + MAX_DECODE_QUERIES)
            cache.append(k[:, :, part], v[:, :, part])
            rows = {name: y[:, :, part] if isinstance(y, Tensor) else y for name, y in queries.items()}
            caches = {"k_cache": cache.k, "v_cache": cache.v}
            outs.append(
                self.operator.decode(**rows, **caches, seqlens=cache.seqlens, block_table=cache.block_table, **options)
            )
        return torch.cat(outs, dim=2)

    def _check(self, x, cu_seqlens, cache, lengths) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            given = dtype_name(x) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor, got {given}")
        dims, axes = (2, "total") if cu_seqlens is not None else (3, "batch, tokens")
        if x.dim() != dims or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x must be ({axes}, {self.embed_dim}), got shape {tuple(x.shape)}")
        if cache is None:
            if lengths is not None:
                raise ValueError("lengths says how much of a prompt goes into a cache: give a cache too")
            return
        if cu_seqlens is not None:
            raise ValueError("packed sequences (cu_seqlens) cannot go into a cache: pad them and give lengths")
        if not self.is_causal:
            raise ValueError("a cache needs is_causal=True: earlier tokens do not see later ones")
        if lengths is not None and not cache.is_empty:
            raise ValueError("lengths is for prompts, that is for an empty cache; this one has been appended to")


def heads_first(queries: dict) -> dict:
    """The operands of query rows (B, N, Hq, ...) as (B, Hq, N, ...); numbers as they are."""
    return {name: y.transpose(1, 2) if isinstance(y, Tensor) else y for name, y in queries.items()}


def _positions(x: Tensor, cu_seqlens: Tensor | None, cache: KVCache | None) -> Tensor:
    """Position of every token in its sequence."""
    positions = torch.arange(x.shape[-2], device=x.device)
    if cu_seqlens is not None:
        return positions - cu_seqlens[torch.searchsorted(cu_seqlens, positions, right=True) - 1]
    if cache is None or cache.is_empty:
        return positions
    return cache.seqlens[:, None] + positions
