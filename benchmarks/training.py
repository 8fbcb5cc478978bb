"""Time of forward and backward of lla_attention beside softmax attention and, where installed, FlashLLA."""

from __future__ import annotations

import argparse
import sys
from typing import Callable

import torch
from torch import Tensor

from benchmarks import launches, peers
from benchmarks.gradients import gradient_errors
from benchmarks.problems import Shape
from benchmarks.report import Benchmark, Row, Target
from benchmarks.timing import Launch, time_all
from lla_compile import lla_attention, plan
from lla_compile.reference import lla_reference_backward
from lla_compile.tuner.outcome import one_line

RIDGES = (10.0, 1.0, 0.1)
PRECISIONS = ("fast", "accurate")
SHAPES = {
    "peers": (Shape(1024, 64, 32), Shape(1024, 128, 32), Shape(4096, 64, 32), Shape(4096, 128, 32)),
    "small": (Shape(256, 32, 4), Shape(512, 64, 4)),
    "tiny": (Shape(64, 16, 2),),
}
FLASHLLA_RIDGES = (10.0, 1.0)  # below, its error in one pass is 4 to 12 per cent
FLASHLLA_ITERATIONS = 32  # its default
PASSES = ("forward", "training")
# A backward pass takes the host 0.2 ms and more to enqueue; short problems are done sooner.
HEAD_START_MS = 0.4
# Queries whose output has a gradient where errors are measured: the reference costs their square times D^2 in float64.
REFERENCE_ROWS = 1024


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", choices=SHAPES, help="default: peers on a GPU, small on a CPU, tiny with --quick")


def run(options: argparse.Namespace, target: Target) -> list[Row]:
    if options.shapes is None:
        options.shapes = "tiny" if options.quick else "peers" if target.is_cuda else "small"
    rows: list[Row] = []
    for shape in SHAPES[options.shapes]:
        rows += measure(shape, options.dtype, target, options.quick)
    return rows


def measure(shape: Shape, dtype: str, target: Target, quick: bool) -> list[Row]:
    """All rows of one shape, timed in turns."""
    *tensors, grad_out = shape.training_inputs(dtype, target.device)
    timed: dict[tuple, Launch] = {}
    rows: dict[tuple, Row] = {}
    used: dict[tuple, peers.Peer] = {}

    def add(name: str, ridge: float | None, precision: str | None, make: Callable[[], peers.Peer]) -> None:
        key = (name, ridge, precision)
        rows[key] = {**shape.as_row(), "op": name, "ridge": ridge, "precision": precision}
        try:
            used[key] = make()
            timed[(*key, "forward")] = launches.forward(used[key], tensors)
            timed[(*key, "training")] = launches.training(used[key], tensors, grad_out)
        except Exception as error:  # a peer that is installed and does not import
            rows[key]["failure"] = one_line(error)

    add("sdpa", None, None, peers.sdpa)
    for precision in PRECISIONS:
        for ridge in RIDGES:
            add("lla_attention", ridge, precision, lambda: launches.lla(ridge, precision))
    if peers.available("flashlla"):
        for ridge in FLASHLLA_RIDGES:
            add("flashlla", ridge, None, lambda: peers.flashlla(ridge, FLASHLLA_ITERATIONS, target.device))

    times, failures = time_all(timed, target, quick, HEAD_START_MS)
    references = {ridge: _reference(tensors, grad_out, ridge) for ridge in RIDGES}
    for key, row in rows.items():
        failed = [failures[(*key, what)] for what in PASSES if (*key, what) in failures]
        if failed:
            row["failure"] = failed[0]
        if failed or key not in used:
            continue
        row |= {f"{what}_ms": times[(*key, what)].median_ms for what in PASSES}
        row["spread"] = max(times[(*key, what)].spread for what in PASSES)
        name, ridge, _ = key
        try:
            if name in peers.RIDGELESS:
                continue
            row |= _errors(key, used[key], tensors, grad_out, references[ridge])
            if name == "lla_attention":
                row |= _details(key, tensors, grad_out)
        except Exception as error:  # recorded as the row's failure; the others still run
            row["failure"] = one_line(error)
    _compare(rows)
    return list(rows.values())


def _compare(rows: dict[tuple, Row]) -> None:
    """Ratios of forward with backward: over softmax attention, and FlashLLA's at the same ridge over ours."""
    softmax = rows["sdpa", None, None].get("training_ms")
    for (name, ridge, _), row in rows.items():
        if softmax and "training_ms" in row:
            row["time_over_sdpa"] = row["training_ms"] / softmax
        peer = rows.get(("flashlla", ridge, None), {}).get("training_ms")
        if peer and name == "lla_attention" and "training_ms" in row:
            row["flashlla_over_this"] = peer / row["training_ms"]


def _first_rows(grad_out: Tensor) -> Tensor:
    """Gradient of the first head's first rows alone: what follows them then changes nothing in a causal problem."""
    part = torch.zeros_like(grad_out)
    part[:, :1, :REFERENCE_ROWS] = grad_out[:, :1, :REFERENCE_ROWS]
    return part


def _reference(tensors: list[Tensor], grad_out: Tensor, ridge: float) -> tuple[Tensor, ...]:
    return lla_reference_backward(*(x[:, :1, :REFERENCE_ROWS] for x in (grad_out, *tensors)), ridge)


def _errors(key: tuple, peer: peers.Peer, tensors: list[Tensor], grad_out: Tensor, reference: tuple) -> Row:
    """Errors of the gradients that the timed problem has for the reference's rows."""
    name, ridge, precision = key
    rows = _first_rows(grad_out)
    if name != "lla_attention":
        gradients = launches.training(peer, tensors, rows)()
    else:
        q = tensors[0]
        learned = torch.full(q.shape[:3], ridge, device=q.device, requires_grad=True)
        scale = torch.tensor(q.shape[-1] ** -0.5, device=q.device, requires_grad=True)
        leaves = [*(x.detach().requires_grad_() for x in tensors), learned, scale]
        out = lla_attention(*leaves[:4], scale=scale, precision=precision)
        gradients = torch.autograd.grad(out, leaves, rows)
    return gradient_errors([x[:, :1, :REFERENCE_ROWS] if x.dim() else x for x in gradients], reference)


def _details(key: tuple, tensors: list[Tensor], grad_out: Tensor) -> Row:
    """Iterations of both solves and the plans of both passes."""
    _, ridge, precision = key
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, info = lla_attention(*leaves, ridge, precision=precision, return_info=True)
    torch.autograd.grad(out, leaves, grad_out)
    row: Row = {}
    for prefix, iterations in (("", info.iterations), ("adjoint_", info.adjoint.iterations)):
        row[f"{prefix}iterations_mean"] = iterations.double().mean().item()
        row[f"{prefix}iterations_max"] = iterations.max().item()
    for phase in ("forward", "backward"):
        chosen = plan(*tensors, precision=precision, phase=phase)
        row |= {f"{phase}_plan": chosen.config.as_dict(), f"{phase}_plan_source": chosen.source.value}
    return row


BENCHMARK = Benchmark(
    name="training",
    about=__doc__,
    run=run,
    columns=(
        "seqlen", "head_dim", "op", "ridge", "precision", "forward_ms", "training_ms", "time_over_sdpa",
        "flashlla_over_this", "iterations_mean", "adjoint_iterations_mean", "error_dq", "error_dk", "error_dv",
    ),
    add_options=add_options,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
