"""Error of all five gradients against float64 by dtype, length, width, ridge and precision, on normal inputs."""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import replace
from typing import Mapping

import torch
from torch import Tensor

from benchmarks import planned
from benchmarks.problems import Shape, gradient_errors
from benchmarks.report import Benchmark, Row, Target
from lla_compile import plan
from lla_compile.autograd import GRADIENTS, TRAINED
from lla_compile.lowering import INFO, SAVED
from lla_compile.reference import lla_reference_backward
from lla_compile.spec import PRECISIONS, LLASpec
from lla_compile.tuner.outcome import one_line

RIDGES = (1.0, 0.1)
DTYPES = ("bfloat16", "float16")


def run(options: argparse.Namespace, target: Target) -> list[Row]:
    if options.quick:
        seqlens, head_dims = (72,), (16,)
    elif target.is_cuda:
        seqlens, head_dims = (1000, 1024), (64, 96, 128)
    else:
        seqlens, head_dims = (250, 256), (32, 64)
    rows: list[Row] = []
    for dtype, seqlen, head_dim, ridge in itertools.product(DTYPES, seqlens, head_dims, RIDGES):
        shape = Shape(seqlen, head_dim, 1)
        q, k, v, grad_out = shape.training_inputs(dtype, target.device)
        reference = lla_reference_backward(grad_out, q, k, v, ridge)
        for precision in PRECISIONS:
            row = {**shape.as_row(), "dtype": dtype, "precision": precision, "ridge": ridge}
            rows.append(row)
            try:
                spec = shape.spec(dtype, precision)
                results = both_passes(spec, target, {"q": q, "k": k, "v": v, "ridge": ridge}, grad_out)
                row |= gradient_errors([results[name] for name in GRADIENTS], reference) | solves(results)
            except Exception as error:  # recorded as the row's failure; the others still run
                row["failure"] = one_line(error)
    return rows


@torch.no_grad()
def both_passes(spec: LLASpec, target: Target, inputs: Mapping, grad_out: Tensor) -> dict[str, Tensor]:
    """All gradients of the planned kernels, those of ridge and scale by row, and what the two solves did.

    Args:
        spec: of the forward pass.
        target: where.
        inputs: q, k, v and ridge.
        grad_out: (B, H, N, Dv).

    Returns:
        The outputs of the backward pass by name, and ``forward_iterations`` and ``forward_residual``.
    """
    inputs = {"scale": spec.head_dim**-0.5, **inputs}
    forward = planned.bind(plan(spec, device=target.info))(inputs, TRAINED)
    saved = {name: forward[name] for name in SAVED}
    adjoint = replace(spec, phase="backward", cg_tol=None)  # its own default tolerance
    inputs |= saved | {"grad_out": grad_out}
    backward = planned.bind(plan(adjoint, device=target.info))(inputs, (*GRADIENTS, *INFO))
    return dict(backward) | {
        "forward_iterations": forward["iterations"],
        "forward_residual": forward["final_residual"],
    }


def solves(results: Mapping[str, Tensor]) -> Row:
    """Iterations and residuals of the solve for the probe and of the adjoint solve."""
    row: Row = {}
    names = {"": ("forward_iterations", "forward_residual"), "adjoint_": tuple(INFO)}
    for prefix, (iterations, residual) in names.items():
        row[f"{prefix}iterations_mean"] = results[iterations].double().mean().item()
        row[f"{prefix}iterations_max"] = results[iterations].max().item()
        row[f"{prefix}residual_max"] = results[residual].max().item()
    return row


BENCHMARK = Benchmark(
    name="gradients",
    about=__doc__,
    run=run,
    columns=(
        "dtype", "seqlen", "head_dim", "ridge", "precision", *(f"error_{name}" for name in GRADIENTS),
        "error_dscale_rows", "iterations_mean", "adjoint_iterations_mean", "adjoint_iterations_max",
        "adjoint_residual_max",
    ),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
