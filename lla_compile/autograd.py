"""The two passes as one differentiable function, for eager calls and for the operators of ``ops.py`` alike."""

from __future__ import annotations

from functools import lru_cache
from typing import Callable, Mapping, NamedTuple

import torch

from lla_compile import dispatch
from lla_compile.arguments import Options
from lla_compile.dispatch import Inputs
from lla_compile.lowering import INFO, lower
from lla_compile.spec import SOLVING_OPS

# The gradient of each argument that one can be asked for.
_GRADIENT_OF = {"q": "dq", "r": "dr", "k": "dk", "v": "dv", "ridge_rows": "dridge", "scale_value": "dscale"}


@lru_cache(maxsize=None)
def saved(op: str) -> tuple[str, ...]:
    """What the backward pass of an operator needs of its forward pass beside the output."""
    return tuple(lower(op, "backward").given)


@lru_cache(maxsize=None)
def kept(op: str) -> tuple[str, ...]:
    """:func:`saved`, and the output if the backward pass reads it."""
    return (*(("out",) if "out" in lower(op, "backward").row_inputs else ()), *saved(op))


@lru_cache(maxsize=None)
def trained(op: str) -> tuple[str, ...]:
    """What the forward pass returns when a gradient will be needed, in order."""
    return ("out", *saved(op), *(INFO if op in SOLVING_OPS else ()))


@lru_cache(maxsize=None)
def gradients(op: str) -> tuple[str, ...]:
    """The gradients that an operator has, in the order of its arguments."""
    return tuple(name for name in _GRADIENT_OF.values() if name in lower(op, "backward").outputs)


# Of Local Linear Attention.
TRAINED = trained("lla")
GRADIENTS = gradients("lla")


class Arguments(NamedTuple):
    """The arguments of the registered operators. A schema has no "number or tensor", so ridge and scale are pairs.

    An operator has those of them that mean something to it, see :data:`lla_compile.ops.ARGUMENT_NAMES`.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    ridge: float | None = None
    ridge_rows: torch.Tensor | None = None
    scale: float | None = None
    scale_value: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    r: torch.Tensor | None = None
    is_causal: bool = True
    window_size: int | None = None
    precision: str = "accurate"
    cg_tol: float | None = None
    cg_max_iters: int | None = None
    backend: str | None = None
    op: str = "lla"

    @classmethod
    def of(cls, inputs: Inputs, options: Options) -> Arguments:
        ridge, scale = number_or_tensor(inputs.ridge), number_or_tensor(inputs.scale)
        return cls(*inputs[:3], *ridge, *scale, *inputs[5:], *options)

    @property
    def inputs(self) -> Inputs:
        ridge = self.ridge_rows if self.ridge is None else self.ridge
        scale = self.scale_value if self.scale is None else self.scale
        return Inputs(self.q, self.k, self.v, ridge, scale, self.cu_seqlens_q, self.cu_seqlens_k, self.r)

    @property
    def options(self) -> Options:
        return Options(*self[10:])


def number_or_tensor(x) -> tuple:
    """``x`` as the two arguments of a schema that stand for it, (number, tensor), one of them None."""
    return (None, x) if isinstance(x, torch.Tensor) else (x, None)


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


def setup_context(ctx, arguments: Arguments, positions: Mapping[str, int], output: tuple) -> None:
    """Keep what the backward pass needs: the inputs, and of the forward pass what is linear in the length.

    Args:
        ctx: of autograd.
        arguments: of the call.
        positions: where each argument stands among those that autograd knows of.
        output: the values of :func:`trained`.
    """
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    results = dict(zip(trained(arguments.op), output))
    ctx.save_for_backward(*tensors, *(results[name] for name in kept(arguments.op)))
    ctx.others = [None if isinstance(x, torch.Tensor) else (x,) for x in arguments]
    ctx.positions = positions
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def backward(ctx, grad_out: torch.Tensor | None, run: Callable, report: AdjointInfo | None = None) -> tuple:
    """Gradients of the arguments; None for those that need none.

    Args:
        ctx: as :func:`setup_context` left it.
        grad_out: gradient of the output, None if the output was not used.
        run: computes the wanted ones: (arguments, grad_out, kept by name, wanted names) -> tensors by name.
        report: filled with what the adjoint solve did.
    """
    results = [None] * len(ctx.needs_input_grad)
    wanted = {
        name: (argument, ctx.positions[argument])
        for argument, name in _GRADIENT_OF.items()
        if argument in ctx.positions and ctx.needs_input_grad[ctx.positions[argument]]
    }
    if grad_out is None or not wanted:
        return tuple(results)
    tensors = list(ctx.saved_tensors)
    arguments = Arguments(*(tensors.pop(0) if x is None else x[0] for x in ctx.others))
    names = (*wanted, *(INFO if report else ()))
    computed = run(arguments, grad_out, dict(zip(kept(arguments.op), tensors)), names)
    for name, (argument, position) in wanted.items():
        like = getattr(arguments, argument)
        gradient = computed[name]
        if name in ("dridge", "dscale"):
            gradient = gradient.sum_to_size(like.shape).to(like.dtype)
        results[position] = gradient
    if report:
        by_row = (computed[name] for name in INFO)
        packed = arguments.cu_seqlens_q is not None
        report.iterations, report.residual = (x[0].T if packed else x for x in by_row)
    return tuple(results)


def run_forward(arguments: Arguments) -> tuple[torch.Tensor, ...]:
    """The forward pass with all of :func:`trained`."""
    names = trained(arguments.op)
    results = dispatch.run("forward", arguments.inputs, arguments.options, names)
    return tuple(results[name] for name in names)


def run_backward(
    arguments: Arguments, grad_out: torch.Tensor, kept: Mapping[str, torch.Tensor], wanted: tuple[str, ...]
) -> Mapping[str, torch.Tensor]:
    """The backward pass on concrete tensors."""
    if grad_out.stride(3) != 1:
        grad_out = grad_out.contiguous()
    factor = None
    if grad_out.dtype is torch.float16 and grad_out.numel():
        grad_out, factor = _normalised(grad_out)
    given = {"grad_out": grad_out, **kept}
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


_POSITIONS = {name: position for position, name in enumerate(Arguments._fields)}


class Attention(torch.autograd.Function):
    """:func:`run_forward` with its gradient; takes the fields of Arguments and an AdjointInfo or None."""

    @staticmethod
    def forward(*arguments):
        return run_forward(Arguments(*arguments[:-1]))

    @staticmethod
    def setup_context(ctx, inputs, output):
        setup_context(ctx, Arguments(*inputs[:-1]), _POSITIONS, output)
        ctx.report = inputs[-1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, *_):
        return backward(ctx, grad_out, run_backward, ctx.report)
