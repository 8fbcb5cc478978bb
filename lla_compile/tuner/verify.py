"""Measuring again what the database says of this machine: how far times and errors have drifted."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace
from typing import Callable, Collection, Iterable, Mapping

import torch

from lla_compile.devices import DeviceInfo
from lla_compile.dispatch import BACKENDS
from lla_compile.key import bucket_of
from lla_compile.planner import refusal
from lla_compile.tuner.evaluate import Evaluator
from lla_compile.tuner.outcome import Outcome
from lla_compile.tuner.presets import Preset
from lla_compile.tuner.problem import Problem
from lla_compile.tuner.session import Settings
from lla_compile.tuner.space import SearchSpace, usable_backends
from lla_compile.tuner.timing import Timing
from lla_compile.tuner.toolchain import toolchain
from lla_compile.tuner.writer import round_result
from lla_compile.tuning_db import Entry, device_file, overlay_dir, record, shipped_dir, store


@dataclass(frozen=True)
class Selection:
    """Entries of a device.

    Attributes:
        used: what look-ups use on this machine and was measured, in the order of the files, the overlay first.
        left_out: how many are not, by reason.
    """

    used: tuple[Entry, ...]
    left_out: dict[str, int]


@dataclass(frozen=True)
class Reading:
    """An entry measured again.

    Attributes:
        entry: as it was found.
        outcome: what became of its plan now; its time is the one nearest to the recorded, if it was taken twice.
        default_ms: the heuristic default's time in the same run; None if the entry has none or is no longer correct.
    """

    entry: Entry
    outcome: Outcome
    default_ms: float | None = None

    @property
    def drift(self) -> float | None:
        """Time now over the recorded time, minus 1; None if the plan gives no correct result any more."""
        return self.outcome.median_ms / self.entry.result["median_ms"] - 1 if self.outcome.ok else None

    def holds(self, tolerance: float) -> bool:
        return self.outcome.ok and abs(self.drift) <= tolerance

    def updated(self, device_type: str) -> Entry:
        """The entry with what was measured now."""
        result = dict(self.entry.result) | round_result(self.outcome, self.default_ms)
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        search = dict(self.entry.search) | {"date": now}
        return replace(self.entry, result=result, search=search, toolchain=toolchain(device_type), origins=())


def select(device: DeviceInfo, wanted: Mapping[str, Collection]) -> Selection:
    """The entries of ``device`` that agree with ``wanted``.

    Args:
        device: whose files are read, in the overlay and in the shipped database.
        wanted: allowed values of fields of the key, of "backend", and of "seqlen" and "batch_heads", which mean the
            bucket that they fall into.
    """
    used: dict[tuple, Entry] = {}
    left_out: dict[str, int] = {}
    for directory in (overlay_dir(), shipped_dir()):
        document = store.load(device_file(directory, device.id))
        for entry in document.entries if document else ():
            if entry.slot in used or not _agrees(entry, wanted):
                continue
            reason = refusal(entry, device, BACKENDS)
            if reason is None and not entry.measured:
                reason = "it was predicted, never measured"
            if reason is None:
                used[entry.slot] = entry
            else:
                left_out[reason] = left_out.get(reason, 0) + 1
    return Selection(tuple(used.values()), left_out)


def measure(entry: Entry, device: DeviceInfo, torch_device: torch.device, preset: Preset, tolerance: float) -> Reading:
    """Check and time the plan of an entry as the tuner does, in turns with the heuristic default.

    A time that is off by more than ``tolerance`` is taken once more: another program may have been in the way.

    Raises:
        DeviceLost, RuntimeError: as for :class:`lla_compile.tuner.evaluate.Evaluator`.
    """
    problem = Problem(entry.spec(), device, torch_device)
    usable = usable_backends(problem.spec, device)
    if entry.config.backend not in usable:
        usable[entry.config.backend] = BACKENDS[entry.config.backend]
    evaluator = Evaluator(problem, usable, preset)
    outcome = evaluator(entry.config)
    if outcome.ok:
        outcome = evaluator.verify(entry.config) or outcome
    if not outcome.ok:
        return Reading(entry, outcome)
    configs = [entry.config]
    if "default_ms" in entry.result:
        configs.append(SearchSpace.joint(problem.spec, device, usable).default())
    readings = []
    for _ in range(2):
        timing, *default = evaluator.retime(configs)
        readings.append(_reading(entry, outcome, timing, default))
        if readings[-1].holds(tolerance):
            break
    return min(readings, key=lambda reading: abs(reading.drift))


def _reading(entry: Entry, outcome: Outcome, timing: Timing, default: Iterable[Timing]) -> Reading:
    timed = replace(outcome, median_ms=timing.median_ms, spread=timing.spread)
    return Reading(entry, timed, next((d.median_ms for d in default), None))


def _agrees(entry: Entry, wanted: Mapping[str, Collection]) -> bool:
    own = entry.key.as_dict() | {
        "seqlen": entry.tuned.seqlen,
        "batch_heads": entry.tuned.batch_heads,
        "backend": entry.config.backend,
    }
    for name, values in wanted.items():
        if name == "seqlen":
            values = [bucket_of(value, 1).seqlen for value in values]
        elif name == "batch_heads":
            values = [bucket_of(1, value).batch_heads for value in values]
        if own.get(name) not in values:
            return False
    return True


def verify(
    entries: Iterable[Entry], device: DeviceInfo, torch_device: torch.device, settings: Settings, tolerance: float,
    report: Callable[[Reading], None],
) -> list[Reading]:  # fmt: skip
    """Measure entries again; each that is still correct is written with its new figures as soon as it has them.

    Raises:
        DeviceLost, KeyboardInterrupt: what was measured before is written.
    """
    readings = []
    for entry in entries:
        settings.interruption.check()
        with settings.interruption.prompt():
            reading = measure(entry, device, torch_device, settings.preset, tolerance)
        if reading.outcome.ok:
            record(device, [reading.updated(torch_device.type)], path=settings.path)
        readings.append(reading)
        report(reading)
    return readings


def line(reading: Reading, tolerance: float) -> str:
    """A reading in one line: the key, time and error as recorded and now, and what follows."""
    entry, outcome = reading.entry, reading.outcome
    if not outcome.ok:
        return f"{entry.describe()}: {outcome.kind.value}: {outcome.message}"
    recorded = entry.result
    verdict = "holds" if reading.holds(tolerance) else f"off by more than {tolerance:.0%}"
    return (
        f"{entry.describe()}: {outcome.median_ms:.3f} ms, recorded {recorded['median_ms']:.3f} ms "
        f"({reading.drift:+.1%}); error {outcome.error:.1e}, recorded {recorded['error']:.1e}, "
        f"limit {outcome.error_limit:.1e}: {verdict}"
    )
