"""The operators in float64, dense and line by line as the equations: what every backend is checked against.

A direct solve (Cholesky), one head and a few queries at a time, on any device. Nothing here is fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lla_compile.spec import check_ridge

_CHUNK_ELEMENTS = 1 << 24  # of the largest temporary, (queries, keys, head_dim): 128 MiB in float64


def lla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ridge: float | Tensor = 1.0,
    *,
    scale: float | Tensor | None = None,
    is_causal: bool = True,
    window_size: int | None = None,
) -> Tensor:
    """Local Linear Attention in the centred form.

    With p = softmax(scale * q.k) over the visible keys and, for each query::

        kbar = sum_j p_j k_j        delta = kbar - q        C = sum_j p_j (k_j - kbar)(k_j - kbar)^T
        (C + ridge I) u = delta     o = sum_j p_j (1 - (k_j - kbar).u) v_j

    Equal to equations 7-8 of arXiv 2510.01450 with their ridge divided by sum_j exp(s_j - max s).

    Args:
        q: (B, Hq, N, D), any float type.
        k: (B, Hkv, M, D); Hq is a multiple of Hkv.
        v: (B, Hkv, M, Dv).
        ridge: positive; a number or a tensor broadcastable to (B, Hq, N).
        scale: factor of the scores; None means D**-0.5.
        is_causal: query i sees keys j <= i + M - N.
        window_size: number of keys a query sees, its own included; needs ``is_causal``.

    Returns:
        (B, Hq, N, Dv) float64, differentiable; zeros for a query that sees no key.

    Raises:
        ValueError: heads do not divide, the ridge is not positive, or a window without ``is_causal``.
    """
    return _by_rows(_centred, q, k, v, ridge, scale, is_causal, window_size)


def lla_reference_uncentred(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ridge: float | Tensor = 1.0,
    *,
    scale: float | Tensor | None = None,
    is_causal: bool = True,
    window_size: int | None = None,
) -> Tensor:
    """The same operator as equations 7-8 of arXiv 2510.01450 write it: a check on :func:`lla_reference`.

    With w = exp(s - max s), z_j = k_j - q, omega = sum w, mu = sum w z, Sigma = sum w z z^T + ridge omega I and
    rho = Sigma^-1 mu::

        o = sum_j w_j (1 - z_j.rho) v_j / (omega - mu.rho)

    Arguments, result and errors are those of :func:`lla_reference`.
    """
    return _by_rows(_uncentred, q, k, v, ridge, scale, is_causal, window_size)


def lla_reference_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ridge: float | Tensor = 1.0,
    *,
    scale: float | Tensor | None = None,
    is_causal: bool = True,
    window_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`lla_reference` by closed formulas, with one adjoint solve per query.

    Args:
        grad_out: (B, Hq, N, Dv), the gradient g of the output; the others as in :func:`lla_reference`.

    Returns:
        float64 gradients of q, k and v in their shapes, of the ridge as (B, Hq, N), and of the scale as a 0-dim tensor.
    """
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v))
    dridge = torch.zeros(q.shape[:3], dtype=torch.float64, device=q.device)
    dscale = torch.zeros((), dtype=torch.float64, device=q.device)
    for head, kv_head, rows, args in _row_chunks(q, k, v, ridge, scale, is_causal, window_size):
        grads = _backward(grad_out[head][rows].double(), *args)
        dq[head][rows], dridge[head][rows] = grads[0], grads[3]
        dk[kv_head] += grads[1]
        dv[kv_head] += grads[2]
        dscale += grads[4]
    return dq, dk, dv, dridge, dscale


def parallax_reference(
    q: Tensor,
    r: Tensor | None,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | Tensor | None = None,
    is_causal: bool = True,
    window_size: int | None = None,
) -> Tensor:
    """Parallax (arXiv 2605.29157) in its uncentred form, with p = softmax(scale * q.k) over the visible keys::

        o = sum_j p_j v_j (1 + sum_j p_j r.k_j) - sum_j p_j (r.k_j) v_j

    Args:
        r: probes (B, Hq, N, D); None gives softmax attention. The others, result and errors as in
            :func:`lla_reference`.
    """
    outs = []
    for head, _, rows, (queries, keys, values, scale_value, visible) in _chunks(q, k, v, scale, is_causal, window_size):
        p = _weights(queries, keys, scale_value, visible)
        out = p @ values
        if r is not None:
            weighted = p * (r[head][rows].double() @ keys.T)
            out = out * (1 + weighted.sum(-1, keepdim=True)) - weighted @ values
        outs.append(out)
    shape = (*q.shape[:3], v.shape[-1])
    return torch.cat(outs).reshape(shape) if outs else q.new_zeros(shape, dtype=torch.float64)


def parallax_reference_backward(
    grad_out: Tensor,
    q: Tensor,
    r: Tensor | None,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | Tensor | None = None,
    is_causal: bool = True,
    window_size: int | None = None,
) -> dict[str, Tensor]:
    """Gradients of :func:`parallax_reference` by closed formulas: dq, dr (unless r is None), dk, dv and dscale."""
    named = {"dq": q, "dr": r, "dk": k, "dv": v}
    grads = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in named.items() if x is not None}
    grads["dscale"] = torch.zeros((), dtype=torch.float64, device=q.device)
    for head, kv_head, rows, (queries, keys, values, scale_value, visible) in _chunks(
        q, k, v, scale, is_causal, window_size
    ):
        g, probe = grad_out[head][rows].double(), None if r is None else r[head][rows].double()
        p = _weights(queries, keys, scale_value, visible)
        c = torch.ones_like(p)
        if r is not None:
            a = probe @ keys.T
            c = 1 - a + (p * a).sum(-1, keepdim=True)
        h = g @ values.T
        h = h - (p * h).sum(-1, keepdim=True)
        ds = p * (h * c - (p * h * c).sum(-1, keepdim=True))
        grads["dq"][head][rows] = scale_value * ds @ keys
        grads["dk"][kv_head] += scale_value * ds.T @ queries
        grads["dv"][kv_head] += (p * c).T @ g
        grads["dscale"] += (ds * (queries @ keys.T)).sum()
        if r is not None:
            grads["dr"][head][rows] = -(p * h) @ keys
            grads["dk"][kv_head] -= (p * h).T @ probe
    return grads


def _centred(q, k, v, ridge, scale, visible):
    p = _weights(q, k, scale, visible)
    kbar = p @ k
    delta = kbar - q
    centred = k - kbar[:, None]
    u = _solve(_covariance(p, centred), ridge, delta)
    a = _dot_keys(centred, u)
    return (p * (1 - a)) @ v


def _uncentred(q, k, v, ridge, scale, visible):
    w = _exp_scores(q, k, scale, visible)
    z = k - q[:, None]
    omega = w.sum(-1)
    mu = (w[:, :, None] * z).sum(1)
    has_keys = omega > 0
    rho = _solve(_covariance(w, z), torch.where(has_keys, ridge * omega, 1), mu)
    denominator = torch.where(has_keys, omega - (mu * rho).sum(-1), 1)
    return (w * (1 - _dot_keys(z, rho))) @ v / denominator[:, None]


def _backward(g, q, k, v, ridge, scale, visible):
    p = _weights(q, k, scale, visible)
    kbar = p @ k
    delta = kbar - q
    centred = k - kbar[:, None]
    covariance = _covariance(p, centred)
    u = _solve(covariance, ridge, delta)

    gamma = g @ v.T
    gbar = (p * gamma).sum(-1)
    t = (p * gamma) @ k - gbar[:, None] * kbar
    s = _solve(covariance, ridge, t)
    a, b = _dot_keys(centred, u), _dot_keys(centred, s)
    c = 1 - a
    e = gamma * c + a * b + gbar[:, None] * a - b
    dridge = (u * s).sum(-1)
    ebar = gbar - ridge * dridge
    ds = p * (e - ebar[:, None])

    dq = scale * ds @ k + s
    dk = scale * ds.T @ q + (p * (b - gamma + gbar[:, None])).T @ u - (p * c).T @ s
    dv = (p * c).T @ g
    dscale = (ds * (q @ k.T)).sum()
    return dq, dk, dv, dridge, dscale


def _exp_scores(q, k, scale, visible):
    """exp(s - max s) over the visible keys (n, M); zeros for a row that sees none."""
    scores = (scale * (q @ k.T)).masked_fill(~visible, -torch.inf)
    largest = scores.detach().amax(-1, keepdim=True)
    return (scores - torch.where(largest == -torch.inf, 0, largest)).exp()


def _weights(q, k, scale, visible):
    w = _exp_scores(q, k, scale, visible)
    omega = w.sum(-1, keepdim=True)
    return w / torch.where(omega > 0, omega, 1)


def _covariance(weights, offsets):
    """sum_j weights_ij offsets_ij offsets_ij^T, (n, D, D)."""
    return (weights[:, :, None] * offsets).mT @ offsets


def _solve(matrix, ridge, right):
    """(matrix + ridge I)^-1 right for every row, by Cholesky."""
    shifted = matrix + ridge[:, None, None] * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(shifted))[:, :, 0]


def _dot_keys(offsets, x):
    """offsets_ij . x_i, (n, M)."""
    return (offsets @ x[:, :, None])[:, :, 0]


def _by_rows(function, q, k, v, ridge, scale, is_causal, window_size):
    shape = (*q.shape[:3], v.shape[-1])
    pieces = [function(*args) for *_, args in _row_chunks(q, k, v, ridge, scale, is_causal, window_size)]
    return torch.cat(pieces).reshape(shape) if pieces else q.new_zeros(shape, dtype=torch.float64)


def _row_chunks(q, k, v, ridge, scale, is_causal, window_size):
    """:func:`_chunks` with the ridge of each row among the arguments."""
    if not isinstance(ridge, Tensor):
        check_ridge(ridge)
        ridge = torch.tensor(ridge, dtype=torch.float64, device=q.device)
    elif not (ridge > 0).all():
        raise ValueError(f"ridge must be positive, its smallest value is {ridge.min().item()}")
    ridge = ridge.double().expand(q.shape[:3])
    for head, kv_head, rows, (*tensors, scale_value, visible) in _chunks(q, k, v, scale, is_causal, window_size):
        yield head, kv_head, rows, (*tensors, ridge[head][rows], scale_value, visible)


def _chunks(q, k, v, scale, is_causal, window_size):
    """Yield (head, kv_head, rows, arguments): one head and a slice of its queries at a time, in order of memory."""
    batch, heads, seqlen_q, head_dim = q.shape
    kv_heads, seqlen_k = k.shape[1:3]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of key heads, got {heads} and {kv_heads}")
    if window_size is not None and not is_causal:
        raise ValueError("window_size needs is_causal=True")
    scale = head_dim**-0.5 if scale is None else scale
    i = torch.arange(seqlen_q, device=q.device)[:, None] + (seqlen_k - seqlen_q)
    j = torch.arange(seqlen_k, device=q.device)
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
    if is_causal:
        visible &= j <= i
    if window_size is not None:
        visible &= j > i - window_size
    chunk = max(1, _CHUNK_ELEMENTS // max(seqlen_k * head_dim, 1))
    if seqlen_k == 0:
        return
    for b in range(batch):
        for h in range(heads):
            head, kv_head = (b, h), (b, h * kv_heads // heads)
            keys, values = k[kv_head].double(), v[kv_head].double()
            for start in range(0, seqlen_q, chunk):
                rows = slice(start, start + chunk)
                yield head, kv_head, rows, (q[head][rows].double(), keys, values, scale, visible[rows])
