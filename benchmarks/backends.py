"""The plans of every backend beside each other: the same problem, the same run."""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Mapping

import torch

from benchmarks.problems import Shape
from benchmarks.report import Benchmark, Row, Target
from benchmarks.timing import Launch, time_all
from lla_compile import LLASpec, backends, plan
from lla_compile.backends import Executable
from lla_compile.plans import Plan
from lla_compile.tuner.problem import Case

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
    plans = {name: plan(spec, device=target.info, backend=name) for name in _names(spec, target)}
    case = Case(spec, target.device, "benchmark", lambda of: _bind(plan(of, device=target.info)))
    inputs = case.inputs(RIDGE if spec.solves else None)
    launches = {name: _launch(_bind(chosen), inputs, case.ordinary) for name, chosen in plans.items()}
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


def _names(spec: LLASpec, target: Target) -> list[str]:
    """Eager PyTorch is measured where nothing else runs."""
    names = [name for name in backends.NAMES if (name == "eager") != target.is_cuda]
    return [name for name in names if not backends.get(name).unsupported(spec, target.info)]


def _bind(chosen: Plan) -> Executable:
    return backends.get(chosen.config.backend).bind(chosen)


def _launch(executable: Executable, inputs: Mapping, outputs: tuple[str, ...]) -> Launch:
    return lambda: executable(inputs, outputs)


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
