"""The public functions for Parallax, which is given the probe that Local Linear Attention solves for."""

from __future__ import annotations

import torch

from lla_compile import arguments, call, decode_arguments
from lla_compile.arguments import Options
from lla_compile.dispatch import DecodeInputs, Inputs


def parallax_attention(
    q: torch.Tensor,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | torch.Tensor | None = None,
    is_causal: bool = True,
    window_size: int | None = None,
    precision: str = "accurate",
    backend: str | None = None,
) -> torch.Tensor:
    r"""Parallax: softmax attention plus a linear correction along a probe that each query brings.

    Parallax (arXiv 2605.29157) is Local Linear Attention with a learned probe r in place of the solution of a system.
    With :math:`p_{ij} = \mathrm{softmax}_j(\mathrm{scale}\; q_i \cdot k_j)` over the visible keys j of query i and
    :math:`\bar k_i = \sum_j p_{ij} k_j`,

    .. math::
        o_i = \sum_j p_{ij} \bigl(1 - r_i \cdot (k_j - \bar k_i)\bigr) v_j
            = \bigl(1 + \textstyle\sum_j p_{ij}\, r_i \cdot k_j\bigr) \sum_j p_{ij} v_j
              - \sum_j p_{ij} (r_i \cdot k_j) v_j

    r = 0 gives softmax attention. A query without a visible key gives zeros. The keys are read once, forward.

    Args:
        q: queries (B, Hq, N, D), float16, bfloat16, float32 or float64; D from 1 to 256. Any strides; a last stride
            other than 1 costs a copy.
        r: probes (B, Hq, N, D), same shape, dtype and device as q; not multiplied by ``scale``.
        k: keys (B, Hkv, M, D), same dtype and device. Hq is a multiple of Hkv (grouped-query attention).
        v: values (B, Hkv, M, Dv), same dtype and device; Dv from 1 to 256.
        scale: factor of the scores q.k, D**-0.5 by default: a number, or a 0-dim tensor on the device of q.
        is_causal: query i sees keys j <= i + M - N, as if the queries were the last N of M positions.
        window_size: number of keys that a query sees, its own included; needs ``is_causal``.
        precision: "accurate" or "fast". They differ for float32 alone: products in three terms of tf32 or in one. In
            16-bit types no solve amplifies the rounding of weights, and errors are near the rounding of the output.
        backend: "triton" or "eager"; None lets the planner choose, see :func:`lla_compile.plan`.

    Returns:
        Output (B, Hq, N, Dv) in the dtype of q, differentiable in q, r, k, v and a scale that is a tensor.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes, devices or options do not fit.
        NotImplementedError: no backend can run it.

    Example:
        >>> import torch
        >>> from torch.nn.functional import scaled_dot_product_attention
        >>> from lla_compile import parallax_attention
        >>> q, r, k, v = torch.randn(4, 1, 2, 16, 8).unbind()
        >>> parallax_attention(q, r, k, v).shape
        torch.Size([1, 2, 16, 8])
        >>> softmax = scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.allclose(parallax_attention(q, torch.zeros_like(q), k, v), softmax, atol=1e-5)
        True
    """
    q, r, k, v = call.autocast(q, r, k, v)
    options = Options(is_causal, window_size, precision, backend=backend, op="parallax")
    return call.attend(Inputs(q, k, v, None, scale, r=_tensor(r)), options)[0]


def parallax_attention_varlen(
    q: torch.Tensor,
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    scale: float | torch.Tensor | None = None,
    is_causal: bool = True,
    window_size: int | None = None,
    precision: str = "accurate",
    backend: str | None = None,
) -> torch.Tensor:
    """:func:`parallax_attention` of sequences of different lengths, packed one after another; none sees another.

    Sequence b has the queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` and the keys ``cu_seqlens_k[b]`` to
    ``cu_seqlens_k[b + 1]``, and is attended as :func:`parallax_attention` would alone. Any of them may be empty.

    Args:
        q: queries (total_q, Hq, D), the sequences along the first axis.
        r: probes (total_q, Hq, D).
        k: keys (total_k, Hkv, D).
        v: values (total_k, Hkv, Dv).
        cu_seqlens_q: int32 (sequences + 1), rising from 0 to total_q, on the device of q.
        cu_seqlens_k: int32 (sequences + 1), rising from 0 to total_k.
        scale, is_causal, window_size, precision, backend: as in :func:`parallax_attention`.

    Returns:
        Output (total_q, Hq, Dv) in the dtype of q.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`parallax_attention`. The values of ``cu_seqlens_q`` and
            ``cu_seqlens_k`` on a GPU are looked at only under LLA_COMPILE_DEBUG=1, since the host has to wait for
            them.

    Example:
        >>> import torch
        >>> from lla_compile import parallax_attention_varlen
        >>> q = r = k = v = torch.randn(10, 2, 8)  # three sequences of 4, 0 and 6 positions
        >>> ends = torch.tensor([0, 4, 4, 10], dtype=torch.int32)
        >>> parallax_attention_varlen(q, r, k, v, ends, ends).shape
        torch.Size([10, 2, 8])
    """
    arguments.check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    q, r, k, v = call.autocast(q, _tensor(r), k, v)
    arguments.check_probe(r, q)
    q, r, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, r, k, v))
    options = Options(is_causal, window_size, precision, backend=backend, op="parallax")
    out, _, _ = call.attend(Inputs(q, k, v, None, scale, cu_seqlens_q, cu_seqlens_k, r), options)
    return out.squeeze(0).transpose(0, 1)


def parallax_decode(
    q: torch.Tensor,
    r: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    seqlens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    scale: float | torch.Tensor | None = None,
    window_size: int | None = None,
    precision: str = "accurate",
    backend: str | None = None,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Parallax (arXiv 2605.29157) of the last few tokens of sequences whose keys lie in a cache, which is read once.

    What :func:`lla_compile.parallax_attention` gives for the last rows: with
    :math:`p_j = \mathrm{softmax}_j(\mathrm{scale}\; q \cdot k_j)` over the keys that a query sees,
    :math:`o = \sum_j p_j (1 - r \cdot (k_j - \bar k)) v_j` where :math:`\bar k = \sum_j p_j k_j`.

    The Nq new tokens of a sequence are its last ones, and their keys and values are in the cache: query i of sequence b
    sees the keys j <= seqlens[b] - Nq + i, with a window the last ``window_size`` of these. A query that sees no key
    gives zeros. Whatever lies in slots and pages that no query sees, NaN included, has no effect.

    Nothing waits for the device, so that a call can be captured in a CUDA graph and replayed while the lengths, the
    block table and the cache change in place. With ``out`` and ``workspace`` given, no memory is allocated after the
    first call of its kind. There is no gradient.

    Args:
        q: queries (B, Hq, Nq, D) of 1 to 16 new tokens, float16, bfloat16, float32 or float64; D from 1 to 256.
        r: probes (B, Hq, Nq, D), same dtype and device.
        k_cache: keys, same dtype and device, (B, Hkv, M, D) with M slots for each sequence, or with a ``block_table``
            (pages, page_size, Hkv, D). Hq is a multiple of Hkv (grouped-query attention). Any strides, but for a last
            one of 1.
        v_cache: values (B, Hkv, M, Dv), or (pages, page_size, Hkv, Dv); Dv from 1 to 256.
        seqlens: keys of each sequence, the new tokens included, int32 (B,) on the device of q, from 0 to the slots of
            a sequence; None means that all slots are filled.
        block_table: the pages of each sequence in order, int32 (B, pages of a sequence) on the device of q; its
            entries past the last key, or before the window, are not read.
        scale: factor of the scores, D**-0.5 by default: a number, or a 0-dim tensor on the device of q.
        window_size: number of keys that a query sees, its own included.
        precision, backend: as in :func:`lla_compile.parallax_attention`.
        out: a tensor (B, Hq, Nq, Dv) to write the output into, in the dtype of q.
        workspace: scratch memory from :func:`parallax_decode_workspace`, for calls that do not run at the same time.
            Compiled code makes its own.

    Returns:
        Output (B, Hq, Nq, Dv) in the dtype of q, ``out`` if given.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes, devices, strides or options do not fit. Values on a GPU, that is lengths beyond the cache
            and numbers of pages that are not there, are looked at only under LLA_COMPILE_DEBUG=1, since the host has
            to wait for them.
        NotImplementedError: a gradient is required, or no backend can run it.

    Example:
        >>> import torch
        >>> from lla_compile import parallax_attention, parallax_decode
        >>> q, r, k, v = torch.randn(4, 1, 2, 32, 8).unbind()  # a cache of 32 slots, 20 of them filled
        >>> last = slice(19, 20)
        >>> o = parallax_decode(q[:, :, last], r[:, :, last], k, v, seqlens=torch.tensor([20], dtype=torch.int32))
        >>> torch.allclose(o, parallax_attention(q, r, k, v)[:, :, last], atol=1e-5)
        True
    """
    if torch.is_grad_enabled():
        decode_arguments.refuse_gradients("parallax", q=q, r=r, k_cache=k_cache, v_cache=v_cache, scale=scale)
    inputs = DecodeInputs(q, k_cache, v_cache, None, scale, seqlens, block_table, out, workspace, _tensor(r))
    options = Options(True, window_size, precision, backend=backend, op="parallax")
    return call.decode(inputs, options)[0]


def parallax_decode_workspace(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    block_table: torch.Tensor | None = None,
    window_size: int | None = None,
    precision: str = "accurate",
    backend: str | None = None,
) -> torch.Tensor:
    """Scratch memory for calls of :func:`parallax_decode` with these arguments, an uninitialised float32 vector.

    It holds two sums of Dv numbers for every query and each of the ``num_splits`` parts of
    ``print(plan(q, k_cache, v_cache, phase="decode", op="parallax"))``, however long the sequences are. It is empty if
    the plan needs none. Arguments and errors are those of :func:`parallax_decode`.

    Example:
        >>> import torch
        >>> from lla_compile import parallax_decode, parallax_decode_workspace
        >>> q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 32, 8), torch.randn(1, 2, 32, 8)
        >>> out, workspace = torch.empty_like(q), parallax_decode_workspace(q, k, v)
        >>> parallax_decode(q, q, k, v, out=out, workspace=workspace) is out
        True
    """
    options = Options(True, window_size, precision, backend=backend, op="parallax")
    return call.workspace(q, k_cache, v_cache, block_table, options)


def _tensor(r) -> torch.Tensor:
    """``r``, where leaving it out is told from an operator that has none."""
    if not isinstance(r, torch.Tensor):
        raise TypeError(f"r must be a torch.Tensor, got {type(r).__name__}")
    return r
