"""One call of a public function: past the torch.library boundary where nothing needs it, through it elsewhere."""

from __future__ import annotations

import torch

from lla_compile import autograd, dispatch, ops
from lla_compile.arguments import Options
from lla_compile.autograd import AdjointInfo
from lla_compile.dispatch import DecodeInputs, Inputs
from lla_compile.lowering import INFO

_OUT = ("out",)
_WITH_INFO = ("out", *INFO)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the type of an enclosing ``torch.autocast``, as scaled_dot_product_attention takes them."""
    device = tensors[0].device.type if isinstance(tensors[0], torch.Tensor) else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def attend(
    inputs: Inputs, options: Options, return_info: bool = False
) -> tuple[torch.Tensor, list[torch.Tensor], AdjointInfo | None]:
    """The output, with a gradient where one is needed; if ``return_info`` also what the solves did, as INFO names it,
    and what the adjoint solve will have done."""
    needs_grad = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
    if ops.is_traced(inputs.q):
        out, *info = ops.call(inputs, options, return_info, needs_grad)
        return out, info, None
    if not needs_grad:
        results = dispatch.run("forward", inputs, options, _WITH_INFO if return_info else _OUT)
        out, *info = results.values()
        return out, info, None
    report = AdjointInfo() if return_info else None
    out, *others = autograd.Attention.apply(*autograd.Arguments.of(inputs, options), report)
    return out, others[-len(INFO) :] if return_info else [], report


def decode(
    inputs: DecodeInputs, options: Options, return_info: bool = False
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output of one step over a cache, and what the solves did if ``return_info``."""
    if ops.is_traced(inputs.q):
        out, *info = ops.call_decode(inputs, options, return_info)
    else:
        out, *info = dispatch.run_decode(inputs, options, _WITH_INFO if return_info else _OUT).values()
    return out, info


def workspace(q, k_cache, v_cache, block_table, options: Options) -> torch.Tensor:
    """Scratch memory for decoding steps with these arguments."""
    numel = dispatch.decode_workspace_numel(q, k_cache, v_cache, block_table, options)
    return torch.empty(numel, dtype=torch.float32, device=q.device)
