"""Times of several launches in one run; what does not run is a recorded failure."""

from __future__ import annotations

from typing import Callable, Mapping

from benchmarks.report import Target
from lla_compile.tuner.outcome import one_line
from lla_compile.tuner.timing import Timing, interleaved, timer_for, warm_up

Launch = Callable[[], object]


def time_all(
    launches: Mapping[object, Launch], target: Target, quick: bool
) -> tuple[dict[object, Timing], dict[object, str]]:
    """Time launches in turns, each behind a cold second-level cache and a head start of the host.

    Args:
        launches: what is timed, by name.
        target: where.
        quick: fewer repeats.

    Returns:
        Times by name, and for those that raised, the error in one line.
    """
    failures: dict[object, str] = {}
    for name, launch in launches.items():
        try:
            launch()  # compiles, and autotunes where a peer does
            target.synchronize()
        except Exception as error:  # a peer fails in any way it likes
            failures[name] = one_line(error)
    sound = {name: launch for name, launch in launches.items() if name not in failures}
    if not sound:
        return {}, failures
    timer = timer_for(target.device, target.info)
    if target.is_cuda:
        warm_up(timer, next(iter(sound.values())), 300.0)
    budget_ms, repeats = (30.0, (3, 10)) if quick else (200.0, (7, 50))
    return dict(zip(sound, interleaved(timer, list(sound.values()), budget_ms, repeats))), failures
