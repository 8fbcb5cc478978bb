"""Checks of what callers pass for decoding: an LLASpec, or an error that names the argument."""

from __future__ import annotations

import torch

from lla_compile.arguments import Options, check_each, check_probe, check_together, dtype_name, make_spec
from lla_compile.spec import MAX_DECODE_QUERIES, LLASpec

_DENSE = "(batch, heads, slots, head_dim)"
_PAGED = "(pages, page_size, heads, head_dim) since there is a block_table"


def check_tensors(q, k_cache, v_cache, block_table=None) -> None:
    """Raise unless the queries, the caches and the block table fit together; shapes may be symbolic.

    Raises:
        TypeError: not a tensor, not a supported dtype, or different dtypes.
        ValueError: a wrong number of dimensions, mismatched shapes or devices, a size out of range.
        NotImplementedError: a sparse or nested tensor.
    """
    paged = block_table is not None
    check_each({"q": q}, "(batch, heads, new tokens, head_dim)")
    check_each({"k_cache": k_cache, "v_cache": v_cache}, _PAGED if paged else _DENSE)
    k, v = heads_first(k_cache, paged), heads_first(v_cache, paged)
    check_together({"q": q, "k_cache": k, "v_cache": v})
    if not 1 <= q.shape[2] <= MAX_DECODE_QUERIES:
        raise ValueError(f"q must have 1 to {MAX_DECODE_QUERIES} new tokens, got {q.shape[2]}; more are a prefill")
    first, third = ("pages", "page_size") if paged else ("batch size", "slots")
    for axis, what in ((0, first), (2, third)):
        if k.shape[axis] != v.shape[axis]:
            raise ValueError(f"k_cache and v_cache must have the same {what}, got {k.shape[axis]} and {v.shape[axis]}")
    if not paged:
        if k.shape[0] != q.shape[0]:
            raise ValueError(f"q and k_cache must have one batch size, got {q.shape[0]} and {k.shape[0]}")
        return
    if k.shape[0] < 1 or k.shape[2] < 1:
        raise ValueError(f"k_cache must have at least one page of at least one slot, got shape {tuple(k_cache.shape)}")
    _check_int32("block_table", block_table, q)
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
        raise ValueError(
            f"block_table must be (batch, pages of a sequence) with batch {q.shape[0]}, "
            f"got shape {tuple(block_table.shape)}"
        )


def heads_first(cache: torch.Tensor, paged: bool) -> torch.Tensor:
    """A (pages, heads, page_size, width) view of a paged cache; a dense one lies so already."""
    return cache.transpose(1, 2) if paged else cache


def spec_of(q, k_cache, v_cache, block_table, options: Options, r=None) -> LLASpec:
    """The spec of a call. Raises like :func:`check_tensors`, as LLASpec does for the options, and of ``r`` if given."""
    check_tensors(q, k_cache, v_cache, block_table)
    if r is not None:
        check_probe(r, q)
    if block_table is None:
        return make_spec(q, k_cache, v_cache, options, seqlen_k=k_cache.shape[2], phase="decode")
    k, v = heads_first(k_cache, True), heads_first(v_cache, True)
    page_size = k.shape[2]
    capacity = block_table.shape[1] * page_size
    return make_spec(q, k, v, options, seqlen_k=capacity, page_size=page_size, phase="decode")


def check_strides(k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Raise ValueError unless the caches can be read as they lie: to copy one costs more than to decode."""
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.stride(3) != 1 and x.shape[3] != 1:
            raise ValueError(f"{name} must have a last stride of 1, got strides {x.stride()}")


def check_seqlens(seqlens, q: torch.Tensor) -> None:
    """Raise unless ``seqlens`` is one int32 for each sequence, on the device of q; its values are not looked at."""
    _check_int32("seqlens", seqlens, q)
    if seqlens.shape != q.shape[:1]:
        raise ValueError(f"seqlens must have shape (batch,) = ({q.shape[0]},), got {tuple(seqlens.shape)}")


def check_out(out, q: torch.Tensor, head_dim_v: int) -> None:
    """Raise unless the output can be written into ``out``."""
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out must be a torch.Tensor, got {type(out).__name__}")
    shape = (*q.shape[:3], head_dim_v)
    if out.shape != shape:
        raise ValueError(f"out must have shape {tuple(shape)}, got {tuple(out.shape)}")
    if out.dtype != q.dtype:
        raise TypeError(f"out must have the dtype of q, {dtype_name(q)}, got {dtype_name(out)}")
    if out.device != q.device:
        raise ValueError(f"out must be on the device of q, got {out.device} and q on {q.device}")
    if out.stride(3) != 1 and head_dim_v != 1:
        raise ValueError(f"out must have a last stride of 1, got strides {out.stride()}")


def check_workspace(workspace, q: torch.Tensor, needed: int) -> None:
    """Raise unless ``workspace`` is a vector of at least ``needed`` float32 numbers on the device of q."""
    if not isinstance(workspace, torch.Tensor) or workspace.dtype != torch.float32:
        given = dtype_name(workspace) if isinstance(workspace, torch.Tensor) else type(workspace).__name__
        raise TypeError(f"workspace must be a float32 tensor, got {given}")
    if workspace.device != q.device:
        raise ValueError(f"workspace must be on the device of q, got {workspace.device} and q on {q.device}")
    if workspace.dim() != 1 or not workspace.is_contiguous():
        raise ValueError(
            f"workspace must be 1-D and contiguous, got shape {tuple(workspace.shape)} and strides {workspace.stride()}"
        )
    if workspace.shape[0] < needed:
        raise ValueError(
            f"workspace must have at least {needed} elements for this call, got {workspace.shape[0]}; "
            "lla_decode_workspace or parallax_decode_workspace makes one that fits"
        )


def check_values(seqlens, block_table, num_pages: int, spec: LLASpec) -> None:
    """Raise ValueError unless lengths and page numbers lie within the cache; on a device the host waits for them.

    Only the pages that a query sees keys of are looked at.
    """
    capacity = spec.seqlen_k
    if seqlens is not None and not ((seqlens >= 0) & (seqlens <= capacity)).all():
        raise ValueError(f"seqlens must lie between 0 and the {capacity} slots of a sequence, got {seqlens.tolist()}")
    if block_table is None or not block_table.numel():
        return
    first_slots = torch.arange(0, capacity, spec.page_size, device=block_table.device)
    lengths = torch.full_like(block_table[:, 0], capacity) if seqlens is None else seqlens
    used = first_slots < lengths[:, None]
    if spec.window_size is not None:
        used &= first_slots + spec.page_size > lengths[:, None] - spec.seqlen_q + 1 - spec.window_size
    wrong = used & ((block_table < 0) | (block_table >= num_pages))
    if wrong.any():
        sequence, position = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"block_table must name pages from 0 to {num_pages - 1} where a sequence has keys, got "
            f"{block_table[sequence, position].item()} for page {position} of sequence {sequence}"
        )


def refuse_gradients(op: str, **tensors) -> None:
    """Raise NotImplementedError if one of ``tensors`` requires a gradient; what is no tensor is ignored."""
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor) and x.requires_grad:
            raise NotImplementedError(
                f"{op}_decode has no gradient, but {name} requires one: call it under torch.no_grad(), "
                f"or train with {op}_attention"
            )


def _check_int32(name: str, x, q: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor) or x.dtype != torch.int32:
        given = dtype_name(x) if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"{name} must be an int32 tensor, got {given}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, got {x.device} and q on {q.device}")
