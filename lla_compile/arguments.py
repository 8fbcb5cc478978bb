"""Checks of what callers pass: tensors and options in, an LLASpec out, or an error that names the argument."""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch

from lla_compile.spec import DTYPES, MAX_HEAD_DIM, LLASpec, check_ridge

_AXES = "(batch, heads, seqlen, head_dim)"
_DTYPES = tuple(getattr(torch, name) for name in DTYPES)


class Options(NamedTuple):
    """The options of a call, as :func:`lla_compile.lla_attention` documents them, and the operator."""

    is_causal: bool = True
    window_size: int | None = None
    precision: str = "accurate"
    cg_tol: float | None = None
    cg_max_iters: int | None = None
    backend: str | None = None
    op: str = "lla"


def check_tensors(q, k, v) -> None:
    """Raise unless query, key and value fit together; shapes may be symbolic.

    Raises:
        TypeError: not a tensor, not a supported dtype, or different dtypes.
        ValueError: a wrong number of dimensions, mismatched shapes or devices, a size out of range.
        NotImplementedError: a sparse or nested tensor.
    """
    named = {"q": q, "k": k, "v": v}
    check_each(named, _AXES)
    check_together(named)
    for name, x in named.items():
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"q, k and v must have one batch size, got q {q.shape[0]} and {name} {x.shape[0]}")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"k and v must have the same seqlen, got k {k.shape[2]} and v {v.shape[2]}")


def check_each(named: dict, axes: str) -> None:
    """Raise unless all are dense 4-D tensors of a supported dtype; ``axes`` is what the axes should be."""
    for name, x in named.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.layout != torch.strided or x.is_nested:
            raise NotImplementedError(f"{name} must be a dense tensor, got layout {x.layout}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must have dtype {', '.join(DTYPES)}, got {dtype_name(x)}")
        if x.dim() != 4:
            raise ValueError(f"{name} must be 4-D {axes}, got shape {tuple(x.shape)}")


def check_together(named: dict[str, torch.Tensor]) -> None:
    """Raise unless query, key and value, in this order and (_, heads, _, width), fit but for their other axes."""
    (query, q), (key, k), (value, v) = named.items()
    names = f"{query}, {key} and {value}"
    for name, x in named.items():
        if x.dtype != q.dtype:
            raise TypeError(f"{names} must have one dtype, got {query} {dtype_name(q)} and {name} {dtype_name(x)}")
        if x.device != q.device:
            raise ValueError(f"{names} must be on one device, got {query} on {q.device} and {name} on {x.device}")
        if x.shape[1] < 1:
            raise ValueError(f"{name} must have at least one head, got {x.shape[1]}")
        if not 1 <= x.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must have a head_dim from 1 to {MAX_HEAD_DIM}, got {x.shape[3]}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"{query} and {key} must have one head_dim, got {query} {q.shape[3]} and {key} {k.shape[3]}")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"{key} and {value} must have the same heads, got {key} {k.shape[1]} and {value} {v.shape[1]}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{query} must have a multiple of the heads of {key} (grouped-query attention), "
            f"got {query} {q.shape[1]} and {key} {k.shape[1]}"
        )


def check_probe(r, q: torch.Tensor) -> None:
    """Raise unless ``r`` can be the given probe of checked queries ``q``.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape or device.
        NotImplementedError: a sparse or nested tensor.
    """
    if not isinstance(r, torch.Tensor):
        raise TypeError(f"r must be a torch.Tensor, got {type(r).__name__}")
    if r.layout != torch.strided or r.is_nested:
        raise NotImplementedError(f"r must be a dense tensor, got layout {r.layout}")
    if r.dtype != q.dtype:
        raise TypeError(f"r must have the dtype of q, {dtype_name(q)}, got {dtype_name(r)}")
    if r.device != q.device:
        raise ValueError(f"r must be on the device of q, got r on {r.device} and q on {q.device}")
    if r.shape != q.shape:
        raise ValueError(f"r must have the shape of q, {tuple(q.shape)}, got {tuple(r.shape)}")


def spec_of(
    q, k, v, options: Options, num_sequences: int | None = None, phase: str = "forward", r=None
) -> LLASpec:
    """The spec of a call. Raises like :func:`check_tensors` and :func:`check_probe`, and as LLASpec does for the options.

    ``r`` is looked at where there is one.
    """
    check_tensors(q, k, v)
    if r is not None:
        check_probe(r, q)
    return make_spec(q, k, v, options, seqlen_k=k.shape[2], num_sequences=num_sequences, phase=phase)


def make_spec(q, k, v, options: Options, **fields) -> LLASpec:
    """The spec of checked tensors (_, heads, _, width) and of options; ``fields`` are what they do not tell.

    Raises as LLASpec does.
    """
    if not isinstance(options.is_causal, bool):
        raise TypeError(f"is_causal must be True or False, got {options.is_causal!r}")
    return LLASpec(
        dtype=dtype_name(q),
        head_dim=q.shape[3],
        head_dim_v=v.shape[3],
        batch=q.shape[0],
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        seqlen_q=q.shape[2],
        is_causal=options.is_causal,
        window_size=options.window_size,
        precision=options.precision,
        cg_tol=options.cg_tol,
        cg_max_iters=options.cg_max_iters,
        op=options.op,
        **fields,
    )


def check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k) -> None:
    """Raise unless q, k and v can be packed sequences that end at ``cu_seqlens_q`` and ``cu_seqlens_k``.

    Raises:
        TypeError: not a tensor, or ``cu_seqlens`` that are not int32.
        ValueError: a wrong number of dimensions, different numbers of sequences, or another device.
    """
    for name, x in {"q": q, "k": k, "v": v}.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 3:
            raise ValueError(f"{name} must be 3-D (total, heads, head_dim), got shape {tuple(x.shape)}")
    for name, x in {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}.items():
        if not isinstance(x, torch.Tensor) or x.dtype != torch.int32:
            given = dtype_name(x) if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"{name} must be an int32 tensor, got {given}")
        if x.dim() != 1 or x.shape[0] < 1:
            raise ValueError(f"{name} must be 1-D with one element more than there are sequences, got {tuple(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, got {x.device} and q on {q.device}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must have one length, got {len(cu_seqlens_q)} and {len(cu_seqlens_k)}"
        )


def check_cu_seqlens(name: str, cu_seqlens: torch.Tensor, total: int) -> None:
    """Raise ValueError unless ``cu_seqlens`` rises from 0 to ``total``; on a device the host waits for it."""
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != total or any(b < a for a, b in zip(ends, ends[1:])):
        shown = ends if len(ends) < 10 else [*ends[:4], "...", *ends[-4:]]
        raise ValueError(f"{name} must rise from 0 to the {total} packed positions, got {shown}")


def ridge_number(ridge) -> float:
    """``ridge`` as a float. Raises TypeError unless it is a number, ValueError unless it is positive and finite."""
    if not isinstance(ridge, Real) or isinstance(ridge, bool):
        raise TypeError(f"ridge must be a number or a tensor, got {type(ridge).__name__}")
    number = float(ridge)
    check_ridge(number)
    return number


def ridge_rows(ridge: torch.Tensor, q: torch.Tensor, check_values: bool) -> torch.Tensor:
    """``ridge`` expanded to a (B, Hq, N) view.

    ``check_values`` also looks at the values of a tensor on a device, for which the host has to wait.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: on another device than q, not broadcastable to (B, Hq, N), or not positive and finite.
    """
    _check_companion("ridge", ridge, q)
    try:
        rows = ridge.expand(q.shape[:3])
    except RuntimeError:
        raise ValueError(
            f"ridge must broadcast to (batch, heads, seqlen) = {tuple(q.shape[:3])}, got shape {tuple(ridge.shape)}"
        ) from None
    if (check_values or ridge.device.type == "cpu") and not ((ridge > 0) & (ridge < math.inf)).all():
        raise ValueError(f"ridge must be positive and finite, got a tensor with values from {_extremes(ridge)}")
    return rows


def packed_ridge(ridge: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """``ridge`` expanded to a (total, Hq) view for packed queries ``q`` (total, Hq, D); raises as ridge_rows."""
    try:
        return ridge.expand(q.shape[:2])
    except RuntimeError:
        raise ValueError(
            f"ridge must broadcast to (total, heads) = {tuple(q.shape[:2])}, got shape {tuple(ridge.shape)}"
        ) from None


def scale_number(scale) -> float:
    """``scale`` as a float. Raises TypeError unless it is a number, ValueError unless it is finite."""
    if not isinstance(scale, Real) or isinstance(scale, bool):
        raise TypeError(f"scale must be None, a number or a 0-dim tensor, got {type(scale).__name__}")
    number = float(scale)
    if not math.isfinite(number):
        raise ValueError(f"scale must be finite, got {scale!r}")
    return number


def check_scale_tensor(scale: torch.Tensor, q: torch.Tensor) -> None:
    """Raise unless ``scale`` is a 0-dim floating-point tensor on the device of q; its value is not looked at."""
    _check_companion("scale", scale, q)
    if scale.dim():
        raise ValueError(f"scale must be a 0-dim tensor, got shape {tuple(scale.shape)}")


def _check_companion(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be a number or a floating-point tensor, got dtype {dtype_name(x)}")
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, got {name} on {x.device} and q on {q.device}")


def _extremes(x: torch.Tensor) -> str:
    return f"{x.min().item():g} to {x.max().item():g}"


def dtype_name(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
