"""Time and error of lla_attention beside softmax attention and, where installed, FlashLLA and Parallax."""

from __future__ import annotations

import argparse
import sys
from typing import Callable

import torch

from benchmarks import launches, peers
from benchmarks.problems import Shape, executed_flops, last_rows_error, last_rows_reference
from benchmarks.report import Benchmark, Row, Target
from benchmarks.timing import Launch, time_all
from lla_compile import lla_attention, plan
from lla_compile.tuner.outcome import one_line

RIDGES = (10.0, 1.0, 0.1)
PRECISIONS = ("fast", "accurate")
SHAPES = {
    "peers": (
        Shape(1024, 64, 32),
        Shape(1024, 128, 32),
        Shape(4096, 64, 32),
        Shape(4096, 128, 32),
        Shape(16384, 64, 16),
    ),
    "small": (Shape(256, 32, 4), Shape(1024, 64, 4)),
    "tiny": (Shape(64, 16, 2),),
}
FLASHLLA_ITERATIONS = (32, 5)  # its default, and what it takes to be fast


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", choices=SHAPES, help="default: peers on a GPU, small on a CPU, tiny with --quick")


def run(options: argparse.Namespace, target: Target) -> list[Row]:
    if options.shapes is None:
        options.shapes = "tiny" if options.quick else "peers" if target.is_cuda else "small"
    rows: list[Row] = []
    for shape in SHAPES[options.shapes]:
        rows += measure(shape, options.dtype, target, options.quick)
    return rows


@torch.no_grad()
def measure(shape: Shape, dtype: str, target: Target, quick: bool) -> list[Row]:
    """All rows of one shape, timed in turns."""
    q, k, v = shape.inputs(dtype, target.device)
    timed: dict[tuple, Launch] = {}
    rows: dict[tuple, Row] = {}

    def add(name: str, ridge: float | None, precision: str | None, make: Callable[[], peers.Peer]) -> None:
        key = (name, ridge, precision)
        rows[key] = {**shape.as_row(), "op": name, "ridge": ridge, "precision": precision}
        try:
            timed[key] = launches.forward(make(), (q, k, v))
        except Exception as error:  # a peer that is installed and does not import
            rows[key]["failure"] = one_line(error)

    add("sdpa", None, None, peers.sdpa)
    for precision in PRECISIONS:
        for ridge in RIDGES:
            add("lla_attention", ridge, precision, lambda: launches.lla(ridge, precision))
    if peers.available("flashlla"):
        for iterations in FLASHLLA_ITERATIONS:
            for ridge in RIDGES:
                name = f"flashlla, {iterations} iterations"
                add(name, ridge, None, lambda: peers.flashlla(ridge, iterations, target.device))
    if peers.available("fla"):
        add("fla parallax", None, None, lambda: peers.parallax(q / q.shape[-1]))

    times, failures = time_all(timed, target, quick)
    references = {ridge: last_rows_reference(q, k, v, ridge) for ridge in RIDGES}
    softmax = times.get(("sdpa", None, None))
    for key, row in rows.items():
        if key in failures:
            row["failure"] = failures[key]
        if key not in times:
            continue
        row |= {"median_ms": times[key].median_ms, "spread": times[key].spread}
        if softmax:
            row["time_over_sdpa"] = times[key].median_ms / softmax.median_ms
        try:
            row |= _details(key, timed[key], (q, k, v), references, times[key].median_ms)
        except Exception as error:  # recorded as the row's failure; the others still run
            row["failure"] = one_line(error)
    return list(rows.values())


def _details(key: tuple, launch: Launch, tensors: tuple, references: dict, median_ms: float) -> Row:
    """What else a row says: error, and for our own rows the plan, the iterations and the rate."""
    name, ridge, precision = key
    if name in peers.RIDGELESS:
        return {}
    row: Row = {"error": last_rows_error(launch(), references[ridge])}
    if name != "lla_attention":
        return row
    chosen = plan(*tensors, precision=precision)
    iterations = lla_attention(*tensors, ridge, precision=precision, return_info=True)[1].iterations
    return row | {
        "iterations_mean": iterations.double().mean().item(),
        "iterations_max": iterations.max().item(),
        "tflops": executed_flops(chosen, iterations) / (median_ms * 1e-3) / 1e12,
        "plan": chosen.config.as_dict(),
        "plan_source": chosen.source.value,
        "plan_distance": chosen.distance,
    }


BENCHMARK = Benchmark(
    name="forward",
    about=__doc__,
    run=run,
    columns=(
        "seqlen", "head_dim", "batch_heads", "op", "ridge", "precision", "median_ms", "spread", "time_over_sdpa",
        "iterations_mean", "iterations_max", "tflops", "error", "plan_source",
    ),
    add_options=add_options,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
