"""The public functions: Local Linear Attention, and what would run for a call."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lla_compile import arguments, call, decode_arguments, devices, dispatch
from lla_compile.arguments import Options
from lla_compile.autograd import AdjointInfo
from lla_compile.devices import DeviceInfo
from lla_compile.dispatch import Inputs
from lla_compile.plans import Plan
from lla_compile.spec import LLASpec

class SolveInfo(NamedTuple):
    """What the solver did in every query row.

    Attributes:
        iterations: conjugate-gradient steps taken, int32 (B, Hq, N).
        residual: ||r|| / ||r_0|| at the end, float32 (B, Hq, N); 0 where there was nothing to solve.
        adjoint: the same of the adjoint solve, filled by the backward pass; None where no gradient is needed and in
            compiled code.
    """

    iterations: torch.Tensor
    residual: torch.Tensor
    adjoint: AdjointInfo | None = None


def lla_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ridge: float | torch.Tensor = 1.0,
    *,
    scale: float | torch.Tensor | None = None,
    is_causal: bool = True,
    window_size: int | None = None,
    precision: str = "accurate",
    cg_tol: float | None = None,
    cg_max_iters: int | None = None,
    backend: str | None = None,
    return_info: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, SolveInfo]:
    r"""Local Linear Attention: each query is answered by a local linear regression over its visible keys.

    Softmax attention answers with a weighted mean of the values, a local constant. Local Linear Attention
    (arXiv 2510.01450, equations 7 and 8, here in centred form) fits value against key around the query. With
    :math:`p_{ij} = \mathrm{softmax}_j(\mathrm{scale}\; q_i \cdot k_j)` over the visible keys j of query i,

    .. math::
        \bar k_i &= \sum_j p_{ij} k_j \qquad
        C_i = \sum_j p_{ij} (k_j - \bar k_i)(k_j - \bar k_i)^T \\
        (C_i + \lambda_i I)\, u_i &= \bar k_i - q_i \qquad\text{by conjugate gradients} \\
        o_i &= \sum_j p_{ij} \bigl(1 - (k_j - \bar k_i) \cdot u_i\bigr) v_j

    A large ridge :math:`\lambda` gives softmax attention; a small one reproduces values that are an affine function of
    the key. A query without a visible key gives zeros.

    Args:
        q: queries (B, Hq, N, D), float16, bfloat16, float32 or float64; D from 1 to 256. Any strides; a last stride
            other than 1 costs a copy.
        k: keys (B, Hkv, M, D), same dtype and device. Hq is a multiple of Hkv (grouped-query attention).
        v: values (B, Hkv, M, Dv), same dtype and device; Dv from 1 to 256.
        ridge: :math:`\lambda > 0`, relative to the softmax denominator: a number, or a floating-point tensor that
            broadcasts to (B, Hq, N) on the device of q.
        scale: factor of the scores, D**-0.5 by default: a number, or a 0-dim tensor on the device of q.
        is_causal: query i sees keys j <= i + M - N, as if the queries were the last N of M positions.
        window_size: number of keys that a query sees, its own included; needs ``is_causal``.
        precision: "accurate", with errors near the rounding of the output, or "fast", which rounds the operands of
            every product once.
        cg_tol: conjugate gradients stops when ||r|| <= cg_tol ||r_0||; the default depends on dtype and precision.
        cg_max_iters: cap on the iterations; None takes the plan's.
        backend: "triton", "cuda" (for decoding only) or "eager"; None lets the planner choose, see
            :func:`lla_compile.plan`.
        return_info: also return a :class:`SolveInfo`.

    Returns:
        Output (B, Hq, N, Dv) in the dtype of q, and a :class:`SolveInfo` if ``return_info``.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes, devices or options do not fit, or the ridge is not positive. The values of a ridge that
            is a tensor on a GPU are looked at only under LLA_COMPILE_DEBUG=1, since the host has to wait for them.
        NotImplementedError: no backend can run it.

    Example:
        >>> import torch
        >>> from lla_compile import lla_attention
        >>> q, k = torch.randn(2, 1, 4, 64, 8).unbind()
        >>> v = 2 * k[..., :3] + 1  # an affine function of the key is reproduced at the query
        >>> o = lla_attention(q, k, v, ridge=1e-4, is_causal=False)
        >>> o.shape
        torch.Size([1, 4, 64, 3])
        >>> torch.allclose(o, 2 * q[..., :3] + 1, atol=0.05)
        True
    """
    options = Options(is_causal, window_size, precision, cg_tol, cg_max_iters, backend)
    return _attend(Inputs(*call.autocast(q, k, v), ridge, scale), options, return_info)


def lla_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    ridge: float | torch.Tensor = 1.0,
    *,
    scale: float | torch.Tensor | None = None,
    is_causal: bool = True,
    window_size: int | None = None,
    precision: str = "accurate",
    cg_tol: float | None = None,
    cg_max_iters: int | None = None,
    backend: str | None = None,
    return_info: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, SolveInfo]:
    """:func:`lla_attention` of sequences of different lengths, packed one after another; none sees another.

    Sequence b has the queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` and the keys ``cu_seqlens_k[b]`` to
    ``cu_seqlens_k[b + 1]``, and is attended as :func:`lla_attention` would alone. Any of them may be empty.

    Args:
        q: queries (total_q, Hq, D), the sequences along the first axis.
        k: keys (total_k, Hkv, D).
        v: values (total_k, Hkv, Dv).
        cu_seqlens_q: int32 (sequences + 1), rising from 0 to total_q, on the device of q.
        cu_seqlens_k: int32 (sequences + 1), rising from 0 to total_k.
        ridge: a number, or a tensor that broadcasts to (total_q, Hq).
        scale, is_causal, window_size, precision, cg_tol, cg_max_iters, backend: as in :func:`lla_attention`.
        return_info: also return a :class:`SolveInfo`, of tensors (total_q, Hq).

    Returns:
        Output (total_q, Hq, Dv) in the dtype of q, and a :class:`SolveInfo` if ``return_info``.

    Raises:
        TypeError, ValueError, NotImplementedError: as :func:`lla_attention`. The values of ``cu_seqlens_q`` and
            ``cu_seqlens_k`` on a GPU are looked at only under LLA_COMPILE_DEBUG=1, since the host has to wait for
            them.

    Example:
        >>> import torch
        >>> from lla_compile import lla_attention_varlen
        >>> q = k = v = torch.randn(10, 2, 8)  # three sequences of 4, 0 and 6 positions
        >>> ends = torch.tensor([0, 4, 4, 10], dtype=torch.int32)
        >>> lla_attention_varlen(q, k, v, ends, ends).shape
        torch.Size([10, 2, 8])
    """
    arguments.check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    options = Options(is_causal, window_size, precision, cg_tol, cg_max_iters, backend)
    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in call.autocast(q, k, v))
    if isinstance(ridge, torch.Tensor) and ridge.dim():
        ridge = arguments.packed_ridge(ridge, q).T.unsqueeze(0)
    result = _attend(Inputs(*heads_first, ridge, scale, cu_seqlens_q, cu_seqlens_k), options, return_info)
    out, info = result if return_info else (result, None)
    out = out.squeeze(0).transpose(0, 1)
    if info is None:
        return out
    return out, info._replace(iterations=info.iterations[0].T, residual=info.residual[0].T)


def _attend(inputs: Inputs, options: Options, return_info: bool) -> torch.Tensor | tuple[torch.Tensor, SolveInfo]:
    out, info, report = call.attend(inputs, options, return_info)
    return (out, SolveInfo(*info, report)) if return_info else out


def plan(
    q: LLASpec | torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    ridge: float | torch.Tensor = 1.0,
    *,
    device: str | torch.device | DeviceInfo | None = None,
    backend: str | None = None,
    phase: str = "forward",
    scale: float | torch.Tensor | None = None,
    seqlens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    return_info: bool = False,
    **options,
) -> Plan:
    """What :func:`lla_attention`, :func:`lla_decode` or their kin would run, and why: ``print(plan(q, k, v))``.

    Nothing is compiled.

    Args:
        q: a spec, or the queries; with queries go ``k``, ``v`` and the options of :func:`lla_attention`.
        ridge, scale, seqlens, return_info: accepted so that a call's arguments can be passed as they are; no plan
            depends on them.
        device: where it would run: a torch device, a ``DeviceInfo``, or the id or alias of a listed device such as
            "h200", which need not be in this machine. By default the device of the tensors; for a spec, "cuda" if
            there is one, else "cpu".
        backend: plan for this backend only.
        phase: with tensors, "forward", "backward", or "decode" with caches for ``k`` and ``v``; a spec has its own.
        block_table: as in :func:`lla_decode`, if the caches are paged.
        options: ``is_causal``, ``window_size``, ``precision``, ``cg_tol``, ``cg_max_iters`` and ``op``, the operator
            ("lla", "parallax" or "softmax"), with tensors only.

    Raises:
        TypeError, ValueError: as :func:`lla_attention`, or an unknown device.
        NotImplementedError: no backend can run it on the device.

    Example:
        >>> from lla_compile import LLASpec, plan
        >>> spec = LLASpec("float32", head_dim=64, head_dim_v=64, batch=1, num_heads=8, num_kv_heads=8,
        ...                seqlen_q=256, seqlen_k=256)
        >>> plan(spec, device="cpu").config.backend
        'eager'
    """
    if isinstance(q, LLASpec):
        if k is not None or v is not None or options:
            raise TypeError("plan takes either a spec or tensors with options: a spec has its options inside")
        spec = q
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    else:
        known = set(Options._fields) - {"backend"}
        if unknown := sorted(set(options) - known):
            raise TypeError(f"plan got an unknown option {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        if phase == "decode":
            spec = decode_arguments.spec_of(q, k, v, block_table, Options(**options))
        else:
            spec = arguments.spec_of(q, k, v, Options(**options), phase=phase)
        device = device or q.device
    return dispatch.make_plan(spec, _device_info(device), backend)


def _device_info(device: str | torch.device | DeviceInfo) -> DeviceInfo:
    if isinstance(device, DeviceInfo):
        return device
    try:
        return devices.identify(torch.device(device))
    except RuntimeError:  # not PyTorch's name for a device: a product's
        return devices.resolve(device)
