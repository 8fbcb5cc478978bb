"""Rate of the split schedule's cg_step sweep alone: the time of more iterations less the time of fewer."""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import replace

import torch

from benchmarks import planned
from benchmarks.problems import Shape
from benchmarks.report import Benchmark, Row, Target
from benchmarks.timing import Launch, time_all
from lla_compile import plan
from lla_compile.plans import KernelConfig, Plan, Source
from lla_compile.spec import PRECISIONS
from lla_compile.tuner.outcome import one_line

FEWER, MORE = 4, 8
KNOBS = ("block_q", "block_k", "num_warps", "num_stages")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="BQ,BK,WARPS,STAGES", help="default: the planned one, as a split schedule")


@torch.no_grad()
def run(options: argparse.Namespace, target: Target) -> list[Row]:
    if options.quick:
        shapes = [Shape(64, 16, 2)]
    elif target.is_cuda:
        shapes = [Shape(4096, 64, 32), Shape(4096, 128, 32), Shape(16384, 64, 16), Shape(16384, 128, 16)]
    else:
        shapes = [Shape(1024, 64, 4)]
    return [measure(shape, precision, options, target) for shape, precision in itertools.product(shapes, PRECISIONS)]


def measure(shape: Shape, precision: str, options: argparse.Namespace, target: Target) -> Row:
    row: Row = {**shape.as_row(), "precision": precision}
    # A tolerance of 0 keeps every tile at work until the cap.
    specs = {cap: shape.spec(options.dtype, precision, cg_tol=0.0, cg_max_iters=cap) for cap in (FEWER, MORE)}
    try:
        planned = plan(specs[MORE], device=target.info)
        config = _configured(replace(planned.config, schedule="split"), options.config)
        inputs = shape.inputs(options.dtype, target.device)
        launches = {
            cap: _launch(Plan(spec, target.info, config, Source.REQUESTED, 0.0, "a benchmark"), inputs)
            for cap, spec in specs.items()
        }
    except Exception as error:
        return row | {"failure": one_line(error)}
    row |= {"config": config.as_dict(), "config_source": "option" if options.config else planned.source.value}
    times, failures = time_all(launches, target, options.quick)
    if failures:
        return row | {"failure": next(iter(failures.values()))}
    step_ms = (times[MORE].median_ms - times[FEWER].median_ms) / (MORE - FEWER)
    flops = 6 * shape.head_dim * specs[MORE].visible_pairs
    return row | {
        "step_ms": step_ms,
        "tflops": flops / (step_ms * 1e-3) / 1e12,
        "spread": max(timing.spread for timing in times.values()),
    }


def _configured(config: KernelConfig, text: str | None) -> KernelConfig:
    if text is None:
        return config
    values = [int(value) for value in text.split(",")]
    return replace(config, **dict(zip(KNOBS, values, strict=True)))


def _launch(plan: Plan, inputs: tuple) -> Launch:
    named = dict(zip("qkv", inputs)) | {"ridge": 1.0, "scale": plan.spec.head_dim**-0.5}
    return planned.launch(planned.bind(plan), named, ("out",))


BENCHMARK = Benchmark(
    name="sweeps",
    about=__doc__,
    run=run,
    columns=(
        "seqlen", "head_dim", "batch_heads", "precision", "step_ms", "tflops", "spread", "config", "config_source"
    ),
    add_options=add_options,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
