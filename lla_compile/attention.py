"""The public functions: Local Linear Attention, and what would run for a call."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lla_compile import arguments, devices, dispatch, ops
from lla_compile.devices import DeviceInfo
from lla_compile.plans import Plan
from lla_compile.spec import LLASpec

_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


class SolveInfo(NamedTuple):
    """What the solver did in every query row.

    Attributes:
        iterations: conjugate-gradient steps taken, int32 (B, Hq, N).
        residual: ||r|| / ||r_0|| at the end, float32 (B, Hq, N); 0 where there was nothing to solve.
    """

    iterations: torch.Tensor
    residual: torch.Tensor


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
        backend: "triton" or "eager"; None lets the planner choose, see :func:`lla_compile.plan`.
        return_info: also return a :class:`SolveInfo`.

    Returns:
        Output (B, Hq, N, Dv) in the dtype of q, and a :class:`SolveInfo` if ``return_info``.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes, devices or options do not fit, or the ridge is not positive. The values of a ridge that
            is a tensor on a GPU are looked at only under LLA_COMPILE_DEBUG=1, since the host has to wait for them.
        NotImplementedError: a gradient is required of a backend that has no backward pass, or no backend can run it.

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
    # Compiled code and tensors that carry no data see the registered operator; the rest is spared its overhead.
    if torch.compiler.is_compiling() or (q.__class__ not in _PLAIN_TENSORS and isinstance(q, torch.Tensor)):
        run = ops.call
    else:
        run = dispatch.forward
    out, iterations, residual = run(
        q, k, v, ridge, scale, is_causal, window_size, precision, cg_tol, cg_max_iters, backend, return_info
    )
    return (out, SolveInfo(iterations, residual)) if return_info else out


def plan(
    q: LLASpec | torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    ridge: float | torch.Tensor = 1.0,
    *,
    device: str | torch.device | DeviceInfo | None = None,
    backend: str | None = None,
    scale: float | torch.Tensor | None = None,
    return_info: bool = False,
    **options,
) -> Plan:
    """What :func:`lla_attention` would run, and why: ``print(plan(q, k, v))``. Nothing is compiled.

    Args:
        q: a spec, or the queries; with queries go ``k``, ``v`` and the options of :func:`lla_attention`.
        ridge, scale, return_info: accepted so that a call's arguments can be passed as they are; no plan depends on
            them.
        device: where it would run: a torch device, a ``DeviceInfo``, or the id or alias of a listed device such as
            "h200", which need not be in this machine. By default the device of the tensors; for a spec, "cuda" if
            there is one, else "cpu".
        backend: plan for this backend only.
        options: ``is_causal``, ``window_size``, ``precision``, ``cg_tol`` and ``cg_max_iters``, with tensors only.

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
        defaults = dict(is_causal=True, window_size=None, precision="accurate", cg_tol=None, cg_max_iters=None)
        if unknown := sorted(set(options) - set(defaults)):
            raise TypeError(f"plan got an unknown option {', '.join(unknown)}; known: {', '.join(defaults)}")
        spec = arguments.spec_of(q, k, v, **defaults | options)
        device = device or q.device
    return dispatch.make_plan(spec, _device_info(device), backend)


def _device_info(device: str | torch.device | DeviceInfo) -> DeviceInfo:
    if isinstance(device, DeviceInfo):
        return device
    try:
        return devices.identify(torch.device(device))
    except RuntimeError:  # not PyTorch's name for a device: a product's
        return devices.resolve(device)
