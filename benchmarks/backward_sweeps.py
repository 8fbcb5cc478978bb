"""Sweeps of the backward pass of operators that solve nothing, each by itself, in every backend's tiles."""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

from benchmarks import planned
from benchmarks.problems import Shape
from benchmarks.report import Benchmark, Row, Target
from benchmarks.timing import time_all
from lla_compile import LLASpec, backends, plan
from lla_compile.lowering import lower
from lla_compile.plans import KernelConfig, Plan, Source
from lla_compile.tuner.outcome import one_line

OPS = ("parallax", "softmax")
SHAPES = {
    "peers": (Shape(4096, 64, 32), Shape(4096, 128, 32), Shape(16384, 64, 16), Shape(16384, 128, 16)),
    "tiny": (Shape(64, 16, 2),),
}


@torch.no_grad()
def run(options: argparse.Namespace, target: Target) -> list[Row]:
    shapes = SHAPES["tiny" if options.quick or not target.is_cuda else "peers"]
    rows: list[Row] = []
    for shape, op in itertools.product(shapes, OPS):
        rows += measure(shape.spec(options.dtype, op=op, phase="backward"), shape, options, target)
    return rows


def measure(spec: LLASpec, shape: Shape, options: argparse.Namespace, target: Target) -> list[Row]:
    """A row for each configuration: times of all gradients, of those of rows and of those of keys."""
    program = lower(spec.op, "backward")
    keys = tuple(name for name in program.ordinary if name in program.key_outputs)
    of_rows = tuple(name for name in program.ordinary if name not in keys)
    wanted = {"backward": program.ordinary, "grad_q": of_rows, "grad_kv": keys}
    inputs = planned.case(spec, target).inputs(None)
    rows, launches = [], {}
    for number, config in enumerate(_configs(spec, target)):
        row: Row = {**shape.as_row(), "op": spec.op, "config": config.as_dict()}
        rows.append(row)
        try:
            executable = planned.bind(Plan(spec, target.info, config, Source.REQUESTED, 0.0, "a benchmark"))
        except Exception as error:  # recorded; the others still run
            row["failure"] = one_line(error)
            continue
        launches |= {(number, name): planned.launch(executable, inputs, names) for name, names in wanted.items()}
    times, failures = time_all(launches, target, options.quick)
    for (number, name), error in failures.items():
        rows[number]["failure"] = f"{name}: {error}"
    for (number, name), timing in times.items():
        flops = 2 * spec.head_dim * program.wanting(wanted[name]).products(0) * spec.visible_pairs
        rows[number] |= {f"{name}_ms": timing.median_ms, f"{name}_tflops": flops / timing.median_ms / 1e9}
        rows[number]["spread"] = max(rows[number].get("spread", 0.0), timing.spread)
    return rows


def _configs(spec: LLASpec, target: Target) -> list[KernelConfig]:
    """What is planned, and the default and its alternatives of every backend that takes the spec."""
    found = [plan(spec, device=target.info).config]
    for backend in map(backends.get, planned.measured_backends(spec, target)):
        found += [backend.default_config(spec, target.info), *backend.alternatives(spec, target.info)]
    return list(dict.fromkeys(found))


BENCHMARK = Benchmark(
    name="backward_sweeps",
    about=__doc__,
    run=run,
    columns=(
        "seqlen", "head_dim", "batch_heads", "op", "backward_ms", "backward_tflops", "grad_q_ms", "grad_q_tflops",
        "grad_kv_ms", "grad_kv_tflops", "spread", "config",
    ),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
