"""The operator behind torch.library: what torch.compile, torch.export and fake tensors see.

``lla_compile::forward`` returns the output, ``lla_compile::forward_info`` also what the solver did. A schema has no
"number or tensor", so ridge and scale each come as a pair of which one is None.
"""

from __future__ import annotations

import torch

from lla_compile import arguments, dispatch

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, float? ridge, Tensor? ridge_rows, float? scale, Tensor? scale_value, "
    "bool is_causal, SymInt? window_size, str precision, float? cg_tol, int? cg_max_iters, str? backend"
)


def call(q, k, v, ridge, scale, is_causal, window_size, precision, cg_tol, cg_max_iters, backend, return_info):
    """``dispatch.forward`` through the registered operators; traceable."""
    op = torch.ops.lla_compile.forward_info if return_info else torch.ops.lla_compile.forward
    result = op(
        q, k, v, *_number_or_tensor(ridge), *_number_or_tensor(scale),
        is_causal, window_size, precision, cg_tol, cg_max_iters, backend,
    )  # fmt: skip
    return result if return_info else (result, None, None)


def _number_or_tensor(x):
    return (None, x) if isinstance(x, torch.Tensor) else (x, None)


def _run(q, k, v, ridge, ridge_rows, scale, scale_value, *options, return_info):
    ridge = ridge_rows if ridge is None else ridge
    scale = scale_value if scale is None else scale
    out, iterations, residual = dispatch.forward(q, k, v, ridge, scale, *options, return_info)
    return out.contiguous(), iterations, residual


def _fake(q, k, v):
    arguments.check_tensors(q, k, v)
    rows = q.shape[:3]
    return (
        q.new_empty(*rows, v.shape[3]),
        q.new_empty(rows, dtype=torch.int32),
        q.new_empty(rows, dtype=torch.float32),
    )


def _no_backward(ctx, *grads):
    raise NotImplementedError(
        "lla_attention has no backward pass in compiled code yet: call it under torch.no_grad(), "
        "or outside torch.compile with backend='eager'"
    )


def _register(name: str, returns: str, returned: slice | int, return_info: bool) -> None:
    name = f"lla_compile::{name}"
    torch.library.define(name, f"({_ARGUMENTS}) -> {returns}", tags=torch.Tag.pt2_compliant_tag)

    @torch.library.impl(name, "CompositeExplicitAutograd")
    def run(*args):
        return _run(*args, return_info=return_info)[returned]

    @torch.library.register_fake(name)
    def fake(q, k, v, *options):
        return _fake(q, k, v)[returned]

    torch.library.register_autograd(name, _no_backward, setup_context=lambda ctx, inputs, output: None)


_register("forward", "Tensor", 0, return_info=False)
_register("forward_info", "(Tensor, Tensor, Tensor)", slice(None), return_info=True)
