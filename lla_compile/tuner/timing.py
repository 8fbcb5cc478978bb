"""Times of a launch: device events behind a cold second-level cache on CUDA, a host clock on the CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable, Protocol, Sequence

import torch

from lla_compile.devices import DeviceInfo

Launch = Callable[[], object]

# A GPU is kept busy for so long before each launch that it need not wait for the host, which takes 0.2 ms and more to
# enqueue a backward pass, and 20 to 60 us to enqueue a decoding step that itself may take no longer.
_HEAD_START_MS = 0.4
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
    """Time between two events around a launch that finds nothing of its inputs in the second-level cache.

    The cache is emptied by reading ``flush_bytes`` of something else: writing would leave it full of lines that have
    to go back to memory during the launch, 10 us of it on an H200.
    """

    def __init__(self, device: torch.device, flush_bytes: int):
        self._flush = torch.zeros(flush_bytes // 4, dtype=torch.float32, device=device)
        self._sum = torch.zeros((), dtype=torch.float32, device=device)
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def once(self, launch: Launch) -> float:
        torch.sum(self._flush, dim=0, out=self._sum)
        self._start.record()
        launch()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end)


def timer_for(device: torch.device, info: DeviceInfo) -> Timer:
    if device.type != "cuda":
        return CpuTimer()
    head_start_bytes = int(_HEAD_START_MS * 1e6 * info.bandwidth_gbs)
    return CudaTimer(device, max(_MIN_FLUSH_BYTES, 2 * info.l2_bytes, head_start_bytes))


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
