"""One call of an operator of the family on what a transformers model has: projected heads, a cache's slots, a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from lla_compile.nn.operators import Operator
from lla_compile.spec import MAX_DECODE_QUERIES


def attend(
    operator: Operator,
    queries: dict,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    options: dict,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention of N queries, the last of the tokens in the slots of k and v.

    Up to 16 queries over a cache are decoded, unless a gradient is needed: over the cache's own buffers if no row is
    padded, else over a copy that starts at the first token of each row. Padded and packed batches are attended as
    packed sequences.

    Args:
        operator: what to call.
        queries: operands of the query rows by name, (B, Hq, N, ...), and numbers.
        k, v: (B, Hkv, M, D) and (B, Hkv, M, Dv).
        mask: as :func:`lla_mask` returns it.
        options: of the operator.
        cu_seqlens: of queries and keys, int32, if the one row of the batch is packed sequences.

    Returns:
        (B, N, Hq, Dv); zeros or arbitrary rows where a query is padding.
    """
    batch, _, length = queries["q"].shape[:3]
    slots = k.shape[2]
    needs_grad = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in (*queries.values(), *options.values(), k, v)
    )
    if cu_seqlens is not None:
        return _packed(operator, queries, k, v, *(x.to(torch.int32) for x in cu_seqlens), options)
    if mask is not None and mask.dim() == 4 and mask.dtype != torch.bool:
        starts = torch.nn.functional.pad(mask.flatten(1).diff(dim=1) != 0, (1, 0), value=True)
        ends = torch.cat(
            (starts.flatten().nonzero().flatten(), starts.new_full((1,), starts.numel(), dtype=torch.long))
        )
        return _packed(operator, queries, k, v, ends.int(), ends.int(), options)
    if length <= MAX_DECODE_QUERIES and length < slots and not needs_grad:
        return _decode(operator, queries, k, v, mask, options).transpose(1, 2)
    if mask is None:
        return operator.attention(**queries, k=k, v=v, **options).transpose(1, 2)
    mask = mask.flatten(1).expand(batch, slots)
    return _unpadded(operator, queries, k, v, mask, options)


def _decode(operator: Operator, queries: dict, k: Tensor, v: Tensor, mask: Tensor | None, options: dict) -> Tensor:
    seqlens = None
    if mask is not None:
        seqlens = mask.flatten(1).sum(1, dtype=torch.int32).expand(len(k)).contiguous()
        if mask.dim() == 2:
            first = mask.int().argmax(1, keepdim=True)
            rows = (first + torch.arange(k.shape[2], device=k.device)).clamp(max=k.shape[2] - 1)[:, None, :, None]
            k, v = (x.take_along_dim(rows, dim=2) for x in (k, v))
    return operator.decode(**queries, k_cache=k, v_cache=v, seqlens=seqlens, **options)


def _packed(
    operator: Operator, queries: dict, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, options: dict
) -> Tensor:
    """All rows of the batch as one."""
    shape = queries["q"].shape
    rows = {name: _tokens(x) if isinstance(x, Tensor) else x for name, x in queries.items()}
    ends = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    out = operator.varlen(**rows, k=_tokens(k), v=_tokens(v), **ends, **options)
    return out.unflatten(0, (shape[0], shape[2]))


def _unpadded(operator: Operator, queries: dict, k: Tensor, v: Tensor, mask: Tensor, options: dict) -> Tensor:
    """The tokens of padded rows (B, M) as packed sequences, then queries of padding, which see nothing, and padding.

    All shapes are those of the padded batch, so that nothing waits for the device.
    """
    (batch, slots), length = mask.shape, queries["q"].shape[2]
    end = (mask * torch.arange(1, slots + 1, device=mask.device)).max()
    asked = mask if length == slots else mask.take_along_dim((end - length + _arange(length, mask))[None], dim=1)
    order_q, order_k = ((~x).flatten().int().argsort(stable=True) for x in (asked, mask))
    ends_q, ends_k = (torch.nn.functional.pad(x.sum(1).cumsum(0), (1, 2), value=x.numel()) for x in (asked, mask))
    ends_q[0] = ends_k[0] = 0
    ends_k[-2] = ends_k[-3]
    rows = {name: _tokens(x)[order_q] if isinstance(x, Tensor) else x for name, x in queries.items()}
    ends = {"cu_seqlens_q": ends_q.int(), "cu_seqlens_k": ends_k.int()}
    out = operator.varlen(**rows, k=_tokens(k)[order_k], v=_tokens(v)[order_k], **ends, **options)
    return out[order_q.argsort()].unflatten(0, (batch, length))


def _tokens(x: Tensor) -> Tensor:
    """(B, H, N, ...) as (B * N, H, ...)."""
    return x.transpose(1, 2).flatten(0, 1)


def _arange(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device)
