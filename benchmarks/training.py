"""Time of forward and backward of lla_attention beside softmax attention and, where installed, FlashLLA."""

from __future__ import annotations

import sys
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks import comparison, launches, peers
from benchmarks.comparison import Op
from benchmarks.problems import Shape, gradient_errors
from benchmarks.report import Row, Target
from lla_compile import lla_attention, plan
from lla_compile.reference import lla_reference_backward

SHAPES = {
    "peers": (Shape(1024, 64, 32), Shape(1024, 128, 32), Shape(4096, 64, 32), Shape(4096, 128, 32)),
    "small": (Shape(256, 32, 4), Shape(512, 64, 4)),
    "tiny": (Shape(64, 16, 2),),
}
FLASHLLA_RIDGES = (10.0, 1.0)  # below, its error in one pass is 4 to 12 per cent
FLASHLLA_ITERATIONS = 32  # its default
# Queries whose output has a gradient where errors are measured: the reference costs their square times D^2 in float64.
REFERENCE_ROWS = 1024


def measure(shape: Shape, dtype: str, target: Target, quick: bool) -> list[Row]:
    """All rows of one shape."""
    *tensors, grad_out = shape.training_inputs(dtype, target.device)
    ops = comparison.standard_ops()
    if peers.available("flashlla"):
        for ridge in FLASHLLA_RIDGES:
            ops[Op("flashlla", ridge)] = partial(peers.flashlla, ridge, FLASHLLA_ITERATIONS, target.device)
    reference = cache(lambda ridge: _reference(tensors, grad_out, ridge))

    def details(op: Op, peer: peers.Peer, row: Row) -> Row:
        errors = _errors(op, peer, tensors, grad_out, reference(op.ridge))
        return errors | _details(op, tensors, grad_out) if op.is_own else errors

    passes = {
        "forward_ms": lambda peer: launches.forward(peer, tensors),
        "training_ms": lambda peer: launches.training(peer, tensors, grad_out),
    }
    rows = comparison.compare(shape, ops, passes, details, target, quick)
    for op, row in rows.items():
        peer_ms = rows.get(Op("flashlla", op.ridge), {}).get("training_ms")
        if op.is_own and peer_ms and "training_ms" in row:
            row["flashlla_over_this"] = peer_ms / row["training_ms"]
    return list(rows.values())


def _first_rows(grad_out: Tensor) -> Tensor:
    """Gradient of the first head's first rows alone: what follows them then changes nothing in a causal problem."""
    part = torch.zeros_like(grad_out)
    part[:, :1, :REFERENCE_ROWS] = grad_out[:, :1, :REFERENCE_ROWS]
    return part


def _reference(tensors: list[Tensor], grad_out: Tensor, ridge: float) -> tuple[Tensor, ...]:
    return lla_reference_backward(*(x[:, :1, :REFERENCE_ROWS] for x in (grad_out, *tensors)), ridge)


def _errors(op: Op, peer: peers.Peer, tensors: list[Tensor], grad_out: Tensor, reference: tuple) -> Row:
    """Errors of the gradients that the timed problem has for the reference's rows."""
    rows = _first_rows(grad_out)
    if not op.is_own:
        gradients = launches.training(peer, tensors, rows)()
    else:
        q = tensors[0]
        learned = torch.full(q.shape[:3], op.ridge, device=q.device, requires_grad=True)
        scale = torch.tensor(q.shape[-1] ** -0.5, device=q.device, requires_grad=True)
        leaves = [*(x.detach().requires_grad_() for x in tensors), learned, scale]
        out = lla_attention(*leaves[:4], scale=scale, precision=op.precision)
        gradients = torch.autograd.grad(out, leaves, rows)
    return gradient_errors([x[:, :1, :REFERENCE_ROWS] if x.dim() else x for x in gradients], reference)


def _details(op: Op, tensors: list[Tensor], grad_out: Tensor) -> Row:
    """Iterations of both solves and the plans of both passes."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, info = lla_attention(*leaves, op.ridge, precision=op.precision, return_info=True)
    torch.autograd.grad(out, leaves, grad_out)
    row: Row = {}
    for prefix, iterations in (("", info.iterations), ("adjoint_", info.adjoint.iterations)):
        row[f"{prefix}iterations_mean"] = iterations.double().mean().item()
        row[f"{prefix}iterations_max"] = iterations.max().item()
    for phase in ("forward", "backward"):
        chosen = plan(*tensors, precision=op.precision, phase=phase)
        row |= {f"{phase}_plan": chosen.config.as_dict(), f"{phase}_plan_source": chosen.source.value}
    return row


BENCHMARK = comparison.comparison(
    name="training",
    about=__doc__,
    shapes=SHAPES,
    measure=measure,
    columns=(
        "seqlen", "head_dim", "op", "ridge", "precision", "forward_ms", "training_ms", "time_over_sdpa",
        "flashlla_over_this", "iterations_mean", "adjoint_iterations_mean", "error_dq", "error_dk", "error_dv",
    ),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
