"""Times of a launch: device events behind a cold second-level cache on CUDA, a host clock on the CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable, Protocol, Sequence

import torch

Launch = Callable[[], object]

# Clearing this much also keeps the GPU busy while the host enqueues the launch: 60 us at 4 TB/s.
_MIN_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class Timing:
    """Median of the repeats, and their interquartile range over the median."""

    median_ms: float
    spread: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        times = torch.tensor(samples, dtype=torch.float64)
        low, median, high = torch.quantile(times, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        return cls(median, (high - low) / median if median > 0 else 0.0)


class Timer(Protocol):
    def once(self, launch: Launch) -> float:
        """Milliseconds of one launch."""


class CpuTimer:
    """Wall-clock time of a launch."""

    def once(self, launch: Launch) -> float:
        start = time.perf_counter()
        launch()
        return 1e3 * (time.perf_counter() - start)


class CudaTimer:
    """Time between two events around a launch that finds nothing of its inputs in the second-level cache."""

    def __init__(self, device: torch.device, l2_bytes: int):
        self._flush = torch.empty(max(2 * l2_bytes, _MIN_FLUSH_BYTES), dtype=torch.uint8, device=device)
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def once(self, launch: Launch) -> float:
        self._flush.zero_()
        self._start.record()
        launch()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end)


def timer_for(device: torch.device, l2_bytes: int) -> Timer:
    return CudaTimer(device, l2_bytes) if device.type == "cuda" else CpuTimer()


def warm_up(timer: Timer, launch: Launch, milliseconds: float) -> None:
    """Launch for a while, so that the first configuration is not timed at idle clocks."""
    end = time.perf_counter() + milliseconds / 1e3
    while time.perf_counter() < end:
        timer.once(launch)


def interleaved(timer: Timer, launches: Sequence[Launch], budget_ms: float, repeats: tuple[int, int]) -> list[Timing]:
    """Time several launches in turns, so that a drift of the clocks meets all of them alike.

    Args:
        timer: how one launch is timed.
        launches: what is timed.
        budget_ms: time to spend on each launch.
        repeats: fewest and most repeats, whatever the budget.
    """
    rounds = [[timer.once(launch) for launch in launches]]  # warm, and an estimate
    fewest, most = repeats
    count = max(fewest, min(most, int(budget_ms * len(launches) / max(sum(rounds[0]), 1e-6))))
    rounds = [[timer.once(launch) for launch in launches] for _ in range(count)]
    return [Timing.of(samples) for samples in zip(*rounds)]
