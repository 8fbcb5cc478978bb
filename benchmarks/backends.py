"""The plans of every backend beside each other: the same problem, the same run."""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

from benchmarks import planned
from benchmarks.problems import Shape
from benchmarks.report import Benchmark, Row, Target
from benchmarks.timing import time_all
from lla_compile import LLASpec, plan

RIDGE = 1.0
PROBLEMS = (("lla", "forward", "fast"), ("lla", "forward", "accurate"), ("parallax", "forward", "accurate"),
            ("parallax", "backward", "accurate"))  # fmt: skip
SHAPES = {
    "peers": tuple(Shape(n, d, heads) for n, heads in ((1024, 32), (4096, 32), (16384, 16)) for d in (64, 128)),
    "tiny": (Shape(64, 16, 2),),
}


@torch.no_grad()
def run(options: argparse.Namespace, target: Target) -> list[Row]:
    shapes = SHAPES["tiny" if options.quick or not target.is_cuda else "peers"]
    rows: list[Row] = []
    for shape, (op, phase, precision) in itertools.product(shapes, PROBLEMS):
        rows += measure(shape.spec(options.dtype, precision, op=op, phase=phase), shape, options, target)
    return rows


def measure(spec: LLASpec, shape: Shape, options: argparse.Namespace, target: Target) -> list[Row]:
    """A row for each backend that takes the spec."""
    names, case = planned.measured_backends(spec, target), planned.case(spec, target)
    plans = {name: plan(spec, device=target.info, backend=name) for name in names}
    inputs = case.inputs(RIDGE if spec.solves else None)
    launches = {name: planned.launch(planned.bind(x), inputs, case.ordinary) for name, x in plans.items()}
    times, failures = time_all(launches, target, options.quick)
    rows = []
    for name, chosen in plans.items():
        row: Row = {**shape.as_row(), "op": spec.op, "phase": spec.phase, "precision": spec.precision, "backend": name}
        row |= {"plan": chosen.config.as_dict(), "plan_source": chosen.source.value}
        if name in failures:
            row["failure"] = failures[name]
        else:
            row |= {"median_ms": times[name].median_ms, "spread": times[name].spread}
            if name != "triton" and "triton" in times:
                row["triton_over_this"] = times["triton"].median_ms / times[name].median_ms
        rows.append(row)
    return rows


BENCHMARK = Benchmark(
    name="backends",
    about=__doc__,
    run=run,
    columns=(
        "seqlen", "head_dim", "batch_heads", "op", "phase", "precision", "backend", "median_ms", "spread",
        "triton_over_this", "plan_source",
    ),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
