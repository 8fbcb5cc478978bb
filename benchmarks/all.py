"""Every benchmark in one process; one that fails is recorded and the others still run."""

from __future__ import annotations

import sys
import time
from typing import Sequence

from benchmarks import (
    accuracy,
    backends,
    backward_sweeps,
    decode,
    forward,
    gradients,
    memory,
    overhead,
    parallax,
    solver,
    sweeps,
    training,
    varlen,
)
from benchmarks.report import Benchmark, Target, common_parser, environment, print_rows, write_json
from lla_compile.tuner.outcome import one_line

_MODULES = (
    forward, backends, training, varlen, decode, parallax, sweeps, backward_sweeps, accuracy, gradients, solver, memory,
    overhead,
)  # fmt: skip
BENCHMARKS = tuple(module.BENCHMARK for module in _MODULES)


def main(argv: Sequence[str] | None = None, benchmarks: Sequence[Benchmark] = BENCHMARKS) -> int:
    """Run all; returns 1 if a benchmark failed as a whole, else 0."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = common_parser("python -m benchmarks.all", __doc__).parse_args(argv)
    target = Target.of(options.device)
    rows = []
    for benchmark in benchmarks:
        start = time.perf_counter()
        row = {"benchmark": benchmark.name, "failure": None}
        try:
            row["file"] = benchmark.measure(benchmark.parser().parse_args(argv)).name
        except Exception as error:  # recorded; the others still run
            row["failure"] = one_line(error)
        row["seconds"] = time.perf_counter() - start
        rows.append(row)
        # After each, so that a run that is stopped says how far it came.
        write_json(options.out / target.info.id / "all.json", {"environment": environment(target), "rows": rows})
    print_rows("all", ("benchmark", "seconds", "file"), rows)
    return int(any(row["failure"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
