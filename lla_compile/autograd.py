"""The two passes as one differentiable function, for eager calls and for the operators of ``ops.py`` alike."""

from __future__ import annotations

from typing import Callable, Mapping, NamedTuple

import torch

from lla_compile import dispatch
from lla_compile.arguments import Options
from lla_compile.dispatch import Inputs
from lla_compile.lowering import INFO, SAVED

# What the forward pass returns when a gradient will be needed, in order.
TRAINED = ("out", *SAVED, *INFO)
GRADIENTS = ("dq", "dk", "dv", "dridge", "dscale")


class Arguments(NamedTuple):
    """The arguments of the registered operators. A schema has no "number or tensor", so ridge and scale are pairs."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    ridge: float | None
    ridge_rows: torch.Tensor | None
    scale: float | None
    scale_value: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    is_causal: bool
    window_size: int | None
    precision: str
    cg_tol: float | None
    cg_max_iters: int | None
    backend: str | None

    @classmethod
    def of(cls, inputs: Inputs, options: Options) -> Arguments:
        ridge, scale = number_or_tensor(inputs.ridge), number_or_tensor(inputs.scale)
        return cls(*inputs[:3], *ridge, *scale, *inputs[5:], *options)

    @property
    def inputs(self) -> Inputs:
        ridge = self.ridge_rows if self.ridge is None else self.ridge
        scale = self.scale_value if self.scale is None else self.scale
        return Inputs(self.q, self.k, self.v, ridge, scale, self.cu_seqlens_q, self.cu_seqlens_k)

    @property
    def options(self) -> Options:
        return Options(*self[9:])


def number_or_tensor(x) -> tuple:
    """``x`` as the two arguments of a schema that stand for it, (number, tensor), one of them None."""
    return (None, x) if isinstance(x, torch.Tensor) else (x, None)


# Positions in Arguments of what a gradient can be asked for, in the order of GRADIENTS.
_DIFFERENTIABLE = tuple(Arguments._fields.index(name) for name in ("q", "k", "v", "ridge_rows", "scale_value"))


class AdjointInfo:
    """What the adjoint solve did; None until the backward pass has run.

    Attributes:
        iterations: conjugate-gradient steps taken, int32 (B, Hq, N); (total_q, Hq) of packed sequences.
        residual: ||r|| / ||r_0|| at the end, likewise.
    """

    iterations: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    def __repr__(self) -> str:
        return f"AdjointInfo(iterations={self.iterations}, residual={self.residual})"


def setup_context(ctx, inputs: tuple, output: tuple) -> None:
    """Keep what the backward pass needs: the inputs, lse, kbar and the probe, all linear in the length."""
    arguments = Arguments(*inputs[: len(Arguments._fields)])
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    ctx.save_for_backward(*tensors, *output[1 : 1 + len(SAVED)])
    ctx.others = [None if isinstance(x, torch.Tensor) else (x,) for x in arguments]
    ctx.arity = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def backward(ctx, grad_out: torch.Tensor | None, run: Callable, report: AdjointInfo | None = None) -> tuple:
    """Gradients of the arguments; None for those that need none.

    Args:
        ctx: as :func:`setup_context` left it.
        grad_out: gradient of the output, None if the output was not used.
        run: computes the wanted ones: (arguments, grad_out, saved by name, wanted names) -> tensors by name.
        report: filled with what the adjoint solve did.
    """
    gradients = [None] * ctx.arity
    wanted = [(position, name) for position, name in zip(_DIFFERENTIABLE, GRADIENTS) if ctx.needs_input_grad[position]]
    if grad_out is None or not wanted:
        return tuple(gradients)
    tensors = list(ctx.saved_tensors)
    arguments = Arguments(*(tensors.pop(0) if x is None else x[0] for x in ctx.others))
    names = tuple(name for _, name in wanted)
    results = run(arguments, grad_out, dict(zip(SAVED, tensors)), names + (tuple(INFO) if report else ()))
    for position, name in wanted:
        like = arguments[position]
        gradient = results[name]
        if name in ("dridge", "dscale"):
            gradient = gradient.sum_to_size(like.shape).to(like.dtype)
        gradients[position] = gradient
    if report:
        by_row = (results[name] for name in INFO)
        packed = arguments.cu_seqlens_q is not None
        report.iterations, report.residual = (x[0].T if packed else x for x in by_row)
    return tuple(gradients)


def run_forward(arguments: Arguments) -> tuple[torch.Tensor, ...]:
    """The forward pass with all of TRAINED."""
    results = dispatch.run("forward", arguments.inputs, arguments.options, TRAINED)
    return tuple(results[name] for name in TRAINED)


def run_backward(
    arguments: Arguments, grad_out: torch.Tensor, saved: Mapping[str, torch.Tensor], wanted: tuple[str, ...]
) -> Mapping[str, torch.Tensor]:
    """The backward pass on concrete tensors."""
    if grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()
    factor = None
    if grad_out.dtype is torch.float16 and grad_out.numel():
        grad_out, factor = _normalised(grad_out)
    given = {"grad_out": grad_out, **saved}
    results = dispatch.run("backward", arguments.inputs, arguments.options, wanted, given)
    if factor is None:
        return results
    return {name: x if name in INFO else x * factor for name, x in results.items()}


def _normalised(grad_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``grad_out`` with values of about 1 at most, and the power of two to multiply the gradients by, NaN if any of
    its values is not finite; nothing waits for the device.

    Gradients are linear in it. The scaled loss of float16 training grows until something overflows, which has to be
    the gradients, where it is seen, and not the weights on the way to them, which saturate.
    """
    largest = torch.linalg.vector_norm(grad_out, torch.inf, dtype=torch.float32)
    power = torch.exp2(torch.frexp(largest).exponent.clamp(-14, 15))  # all of these are float16 numbers
    return grad_out / power, power + 0 * largest


class Attention(torch.autograd.Function):
    """:func:`run_forward` with its gradient; takes the fields of Arguments and an AdjointInfo or None."""

    @staticmethod
    def forward(*arguments):
        return run_forward(Arguments(*arguments[:-1]))

    @staticmethod
    def setup_context(ctx, inputs, output):
        setup_context(ctx, inputs, output)
        ctx.report = inputs[-1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, *_):
        return backward(ctx, grad_out, run_backward, ctx.report)
