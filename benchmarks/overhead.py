"""Time that the host spends in a call beyond the bare launch, and that importing adds to importing torch."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import torch

from benchmarks import planned
from benchmarks.problems import Shape
from benchmarks.report import Benchmark, Row, Target
from lla_compile import lla_attention, plan

_IMPORT = "import time, torch; start = time.perf_counter(); import lla_compile; print(time.perf_counter() - start)"
_IN_FLIGHT = 64  # launches between waits, so that the host never meets a full queue


@torch.no_grad()
def run(options: argparse.Namespace, target: Target) -> list[Row]:
    # As little work as there can be: the GPU must keep up with the host, and a CPU does the work itself.
    shape = Shape(64, 64, 1) if target.is_cuda else Shape(1, 1, 1)
    q, k, v = shape.inputs(options.dtype, target.device)
    chosen = plan(q, k, v)
    inputs = {"q": q, "k": k, "v": v, "ridge": 1.0, "scale": shape.head_dim**-0.5}
    launches = {
        "bare launch": planned.launch(planned.bind(chosen), inputs, ("out",)),
        "lla_attention": lambda: lla_attention(q, k, v, 1.0),
    }
    times = host_times(launches, target, 200 if options.quick else 4000)
    rows: list[Row] = [
        {"what": name, "median_us": time_us, "backend": chosen.config.backend} for name, time_us in times.items()
    ]
    rows.append({"what": "overhead of a call", "median_us": times["lla_attention"] - times["bare launch"]})
    rows.append({"what": "import beyond torch", "median_us": 1e6 * import_seconds(1 if options.quick else 5)})
    return rows


def host_times(launches: dict, target: Target, repeats: int) -> dict[str, float]:
    """Median microseconds until each launch returns to the host, taken in turns."""
    samples: dict[str, list[float]] = {name: [] for name in launches}
    for turn in range(repeats + 50):
        if turn % _IN_FLIGHT == 0:
            target.synchronize()
        for name, launch in launches.items():
            start = time.perf_counter()
            launch()
            if turn >= 50:  # compiled, cached and warm
                samples[name].append(time.perf_counter() - start)
    target.synchronize()
    return {name: 1e6 * torch.tensor(x, dtype=torch.float64).median().item() for name, x in samples.items()}


def import_seconds(repeats: int) -> float:
    """Best time of ``import lla_compile`` after ``import torch``, in fresh processes."""
    runs = [subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)]
    runs += [subprocess.run(runs[0].args, capture_output=True, text=True, check=True) for _ in range(repeats - 1)]
    return min(float(done.stdout) for done in runs)


BENCHMARK = Benchmark("overhead", __doc__, run, ("what", "median_us", "backend"))

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
