"""lla_attention timed beside softmax attention and other people's: what forward.py and training.py share."""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from typing import Callable, Mapping, NamedTuple, Sequence

from benchmarks import launches, peers
from benchmarks.peers import Peer
from benchmarks.problems import Shape
from benchmarks.report import Benchmark, Row, Target
from benchmarks.timing import Launch, time_all
from lla_compile.spec import PRECISIONS
from lla_compile.tuner.outcome import one_line

RIDGES = (10.0, 1.0, 0.1)


class Op(NamedTuple):
    """What a row is about; an attention without a ridge or a precision has None."""

    name: str
    ridge: float | None = None
    precision: str | None = None

    @property
    def is_own(self) -> bool:
        return self.name == "lla_attention"


SDPA = Op("sdpa")
Ops = dict[Op, Callable[[], Peer]]


def standard_ops() -> Ops:
    """Softmax attention, and lla_attention in every precision at every ridge."""
    ops: Ops = {SDPA: peers.sdpa}
    for precision, ridge in itertools.product(PRECISIONS, RIDGES):
        ops[Op("lla_attention", ridge, precision)] = partial(launches.lla, ridge, precision)
    return ops


def compare(
    shape: Shape,
    ops: Ops,
    passes: Mapping[str, Callable[[Peer], Launch]],
    details: Callable[[Op, Peer, Row], Row],
    target: Target,
    quick: bool,
) -> dict[Op, Row]:
    """The rows of one shape, timed in turns; what fails is recorded in its row.

    Args:
        shape: what is timed.
        ops: what makes each attention, softmax attention first.
        passes: what launches each pass, by the column of its median; the last is set against softmax attention.
        details: what else to say of an attention that has a ridge, given its row so far.
        target: where.
        quick: fewer repeats.
    """
    rows: dict[Op, Row] = {}
    made: dict[Op, Peer] = {}
    timed: dict[tuple[Op, str], Launch] = {}
    for op, make in ops.items():
        rows[op] = {**shape.as_row(), "op": op.name, "ridge": op.ridge, "precision": op.precision}
        try:
            made[op] = make()
            timed |= {(op, column): launch(made[op]) for column, launch in passes.items()}
        except Exception as error:  # a peer that is installed and does not import
            rows[op]["failure"] = one_line(error)
    times, failures = time_all(timed, target, quick)
    for (op, _), failure in failures.items():
        rows[op].setdefault("failure", failure)
    *_, last = passes
    for op, row in rows.items():
        if "failure" in row:
            continue
        timings = {column: times[op, column] for column in passes}
        row |= {column: timing.median_ms for column, timing in timings.items()}
        row["spread"] = max(timing.spread for timing in timings.values())
        if last in rows[SDPA]:
            row["time_over_sdpa"] = row[last] / rows[SDPA][last]
        try:
            if op.ridge is not None:
                row |= details(op, made[op], row)
        except Exception as error:  # recorded as the row's failure; the others still run
            row["failure"] = one_line(error)
    return rows


def comparison(
    name: str,
    about: str,
    shapes: Mapping[str, Sequence[Shape]],
    measure: Callable[[Shape, str, Target, bool], list[Row]],
    columns: tuple[str, ...],
) -> Benchmark:
    """A benchmark with the option ``--shapes``.

    Args:
        name, about, columns: as a benchmark has them.
        shapes: what the option can name: "peers", "small" and "tiny".
        measure: (shape, dtype, target, quick) -> all rows of one shape.
    """

    def add_options(parser: argparse.ArgumentParser) -> None:
        default = "peers on a GPU, small on a CPU, tiny with --quick"
        parser.add_argument("--shapes", choices=shapes, help=f"default: {default}")

    def run(options: argparse.Namespace, target: Target) -> list[Row]:
        if options.shapes is None:
            options.shapes = "tiny" if options.quick else "peers" if target.is_cuda else "small"
        rows: list[Row] = []
        for shape in shapes[options.shapes]:
            rows += measure(shape, options.dtype, target, options.quick)
        return rows

    return Benchmark(name, about, run, columns, add_options)
