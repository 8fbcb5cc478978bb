"""Error of lla_attention against float64 by dtype, width, ridge, precision and iteration cap, on normal inputs."""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

from benchmarks.problems import Shape, last_rows_error, last_rows_reference
from benchmarks.report import Benchmark, Row, Target
from lla_compile import lla_attention
from lla_compile.spec import PRECISIONS
from lla_compile.tuner.outcome import one_line

RIDGES = (1.0, 0.1, 0.01)
CAPS = (32, 128)
DTYPES = ("bfloat16", "float16", "float32")


@torch.no_grad()
def run(options: argparse.Namespace, target: Target) -> list[Row]:
    seqlen, head_dims = (96, (16,)) if options.quick else (1024, (64, 128))
    rows: list[Row] = []
    for dtype, head_dim in itertools.product(DTYPES, head_dims):
        shape = Shape(seqlen, head_dim, 1)
        q, k, v = shape.inputs(dtype, target.device)
        references = {ridge: last_rows_reference(q, k, v, ridge) for ridge in RIDGES}
        for precision, ridge, cap in itertools.product(PRECISIONS, RIDGES, CAPS):
            row = {**shape.as_row(), "dtype": dtype, "precision": precision, "ridge": ridge, "cg_max_iters": cap}
            rows.append(row)
            try:
                out, info = lla_attention(q, k, v, ridge, precision=precision, cg_max_iters=cap, return_info=True)
                row["error"] = last_rows_error(out, references[ridge])
                row["iterations_mean"] = info.iterations.double().mean().item()
                row["iterations_max"] = info.iterations.max().item()
                row["residual_max"] = info.residual.max().item()
            except Exception as error:  # recorded as the row's failure; the others still run
                row["failure"] = one_line(error)
    return rows


BENCHMARK = Benchmark(
    name="accuracy",
    about=__doc__,
    run=run,
    columns=(
        "dtype", "head_dim", "precision", "ridge", "cg_max_iters", "error", "iterations_mean", "iterations_max",
        "residual_max",
    ),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
