"""The public functions for decoding: Local Linear Attention of new tokens over a cache of keys and values."""

from __future__ import annotations

import torch

from lla_compile import call, decode_arguments
from lla_compile.arguments import Options
from lla_compile.attention import SolveInfo
from lla_compile.dispatch import DecodeInputs


def lla_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    ridge: float | torch.Tensor = 1.0,
    *,
    seqlens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    scale: float | torch.Tensor | None = None,
    window_size: int | None = None,
    precision: str = "accurate",
    cg_tol: float | None = None,
    cg_max_iters: int | None = None,
    backend: str | None = None,
    return_info: bool = False,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, SolveInfo]:
    r"""Local Linear Attention (arXiv 2510.01450) of the last few tokens of sequences whose keys lie in a cache.

    What :func:`lla_compile.lla_attention` gives for the last rows, at about the price of reading the cache once: with
    :math:`p_j = \mathrm{softmax}_j(\mathrm{scale}\; q \cdot k_j)` over the keys that a query sees, one pass takes

    .. math::
        \bar k = \sum_j p_j k_j \quad \bar v = \sum_j p_j v_j \quad
        C = \sum_j p_j (k_j - \bar k)(k_j - \bar k)^T \quad G = \sum_j p_j (k_j - \bar k)(v_j - \bar v)^T

    and the output is :math:`o = \bar v - G^T u` with :math:`(C + \lambda I)\, u = \bar k - q`, see
    :class:`lla_compile.GramState`.

    The Nq new tokens of a sequence are its last ones, and their keys and values are in the cache: query i of sequence b
    sees the keys j <= seqlens[b] - Nq + i, with a window the last ``window_size`` of these. A query that sees no key
    gives zeros. Whatever lies in slots and pages that no query sees, NaN included, has no effect.

    Nothing waits for the device, so that a call can be captured in a CUDA graph and replayed while the lengths, the
    block table and the cache change in place. With ``out`` and ``workspace`` given, no memory is allocated after the
    first call of its kind. There is no gradient.

    Args:
        q: queries (B, Hq, Nq, D) of 1 to 16 new tokens, float16, bfloat16, float32 or float64; D from 1 to 256.
        k_cache: keys, same dtype and device, (B, Hkv, M, D) with M slots for each sequence, or with a ``block_table``
            (pages, page_size, Hkv, D). Hq is a multiple of Hkv (grouped-query attention). Any strides, but for a last
            one of 1.
        v_cache: values (B, Hkv, M, Dv), or (pages, page_size, Hkv, Dv); Dv from 1 to 256.
        ridge: :math:`\lambda > 0`, a number, or a floating-point tensor that broadcasts to (B, Hq, Nq).
        seqlens: keys of each sequence, the new tokens included, int32 (B,) on the device of q, from 0 to the slots of
            a sequence; None means that all slots are filled.
        block_table: the pages of each sequence in order, int32 (B, pages of a sequence) on the device of q; its
            entries past the last key, or before the window, are not read.
        scale: factor of the scores, D**-0.5 by default: a number, or a 0-dim tensor on the device of q.
        window_size: number of keys that a query sees, its own included.
        precision, cg_tol, cg_max_iters, backend: as in :func:`lla_compile.lla_attention`. The eager backend solves
            directly and ignores those of conjugate gradients.
        return_info: also return a :class:`SolveInfo`, of tensors (B, Hq, Nq).
        out: a tensor (B, Hq, Nq, Dv) to write the output into, in the dtype of q.
        workspace: scratch memory from :func:`lla_decode_workspace`, for calls that do not run at the same time.
            Compiled code makes its own.

    Returns:
        Output (B, Hq, Nq, Dv) in the dtype of q, ``out`` if given, and a :class:`SolveInfo` if ``return_info``.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes, devices, strides or options do not fit. Values on a GPU, that is lengths beyond the
            cache, numbers of pages that are not there and ridges that are not positive, are looked at only under
            LLA_COMPILE_DEBUG=1, since the host has to wait for them.
        NotImplementedError: a gradient is required, or no backend can run it.

    Example:
        >>> import torch
        >>> from lla_compile import lla_attention, lla_decode
        >>> q, k, v = torch.randn(3, 1, 2, 32, 8).unbind()  # a cache of 32 slots, 20 of them filled
        >>> o = lla_decode(q[:, :, 19:20], k, v, seqlens=torch.tensor([20], dtype=torch.int32))
        >>> torch.allclose(o, lla_attention(q, k, v)[:, :, 19:20], atol=1e-5)
        True
    """
    if torch.is_grad_enabled():
        decode_arguments.refuse_gradients("lla", q=q, k_cache=k_cache, v_cache=v_cache, ridge=ridge, scale=scale)
    inputs = DecodeInputs(q, k_cache, v_cache, ridge, scale, seqlens, block_table, out, workspace)
    options = Options(True, window_size, precision, cg_tol, cg_max_iters, backend)
    result, info = call.decode(inputs, options, return_info)
    return (result, SolveInfo(*info)) if return_info else result


def lla_decode_workspace(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    window_size: int | None = None,
    precision: str = "accurate",
    cg_tol: float | None = None,
    cg_max_iters: int | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Scratch memory for calls of :func:`lla_decode` with these arguments, an uninitialised float32 vector.

    It holds the moments of every query for each part that the plan cuts the keys into: ``num_splits`` of
    ``print(plan(q, k_cache, v_cache, phase="decode"))`` times B * Hq * Nq times about D * (D + Dv) numbers, however
    long the sequences are. It is empty if the plan needs none. Arguments and errors are those of :func:`lla_decode`.

    Example:
        >>> import torch
        >>> from lla_compile import lla_decode, lla_decode_workspace
        >>> q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 32, 8), torch.randn(1, 2, 32, 8)
        >>> out, workspace = torch.empty_like(q), lla_decode_workspace(q, k, v)
        >>> lla_decode(q, k, v, out=out, workspace=workspace) is out
        True
    """
    options = Options(True, window_size, precision, cg_tol, cg_max_iters, backend)
    return call.workspace(q, k_cache, v_cache, block_table, options)
