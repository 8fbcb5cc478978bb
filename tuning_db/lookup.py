"""Finding the entry that fits a problem best: exact, nearest, same architecture, none."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Callable, Iterator

from lla_compile.devices import DeviceInfo
from lla_compile.key import Bucket, TuningKey
from lla_compile.plans import KernelConfig, Source
from lla_compile.tuning_db import store
from lla_compile.tuning_db.entry import Entry

Reject = Callable[[KernelConfig, Entry], "str | None"]

_REFUSALS_SHOWN = 3

_log = logging.getLogger(__name__)
_reported_toolchains: set[Path] = set()


@dataclass(frozen=True)
class Match:
    """What a look-up found.

    Attributes:
        entry: the entry, or None.
        source: how well it fits; HEURISTIC if there is none.
        distance: octaves between the bucket that was tuned and the one asked for.
        reason: one sentence on why this entry, or why none.
        file: where the entry is, or None.
    """

    entry: Entry | None
    source: Source
    distance: float
    reason: str
    file: str | None


def lookup(
    key: TuningKey,
    bucket: Bucket,
    seqlen: int,
    batch_heads: int,
    device: DeviceInfo,
    reject: Reject,
    cg_max_iters: int | None = None,
) -> Match:
    """The best entry for a problem. Reads each file once a process; a miss is a result, not an error.

    Levels, best first; at each the user's overlay goes before the shipped database, then the nearest bucket. What was
    measured on this device goes before all that was predicted for it:

    - EXACT: this device, this key, this bucket.
    - NEAREST: this device, this key, and the sizes lie in the entry's validity range.
    - SAME_ARCH: another device of this compute capability, this bucket or inside the validity range.
    - HEURISTIC: no entry.

    Args:
        key, bucket: of the problem, from ``lla_compile.key``.
        seqlen, batch_heads: the sizes themselves, for the validity ranges.
        device: where it will run.
        reject: gives a reason to refuse an entry (stale sources, resources that the device lacks), or None.
        cg_max_iters: the caller's cap, which may make another plan of an entry the faster one.
    """
    query = _Query(key, bucket, seqlen, batch_heads, device)
    refusals: dict[int, str] = {}
    for source, measured, level in _LEVELS:
        for path, entry in level(query):
            if measured not in (None, entry.measured) or id(entry) in refusals:
                continue
            chosen = entry.for_iterations(cg_max_iters)
            if refusal := reject(chosen.config, chosen):
                refusals[id(entry)] = f"{entry.describe()} in {path.name}: {refusal}"
                continue
            reason = _why(source, entry, path, query) + _toolchain_note(entry, path) + _refused(refusals)
            if chosen is not entry:
                reason += f"; at most {cg_max_iters} iterations take less than {entry.config.schedule} does"
            return Match(chosen, source, query.distance(entry), reason, str(path))
    return Match(None, Source.HEURISTIC, 0.0, _why_none(query) + _refused(refusals), None)


@dataclass(frozen=True)
class _Query:
    key: TuningKey
    bucket: Bucket
    seqlen: int
    batch_heads: int
    device: DeviceInfo

    def distance(self, entry: Entry) -> float:
        return entry.tuned.distance(self.bucket)

    def directories(self) -> tuple[Path, Path]:
        return store.overlay_dir(), store.shipped_dir()

    def own_entries(self) -> Iterator[tuple[Path, Entry]]:
        """Entries of this device, the overlay's first."""
        for directory in self.directories():
            path = store.device_file(directory, self.device.id)
            if document := store.load(path):
                yield from ((path, entry) for entry in document.entries)


def _exact(query: _Query) -> list[tuple[Path, Entry]]:
    return _sorted(query, lambda entry: entry.tuned == query.bucket)


def _nearest(query: _Query) -> list[tuple[Path, Entry]]:
    return _sorted(query, lambda entry: entry.covers(query.seqlen, query.batch_heads))


def _sorted(query: _Query, fits: Callable[[Entry], bool]) -> list[tuple[Path, Entry]]:
    """The device's entries of the key that fit: the overlay's first, the nearest, of several backends the fastest."""
    shipped = store.shipped_dir()
    fitting = [(path, entry) for path, entry in query.own_entries() if entry.key == query.key and fits(entry)]
    return sorted(fitting, key=lambda found: (found[0].parent == shipped, query.distance(found[1]), found[1].time_ms))


def _same_architecture(query: _Query) -> Iterator[tuple[Path, Entry]]:
    for directory in query.directories():
        fitting = [
            (path, entry, abs(document.device.sms - query.device.sms))
            for path, document in store.load_all(directory).items()
            if document.device.id != query.device.id and document.device.same_architecture(query.device)
            for entry in document.entries
            if entry.key == query.key
            and (entry.tuned == query.bucket or entry.covers(query.seqlen, query.batch_heads))
        ]

        def rank(found: tuple[Path, Entry, int]) -> tuple:
            path, entry, sms_apart = found
            return not entry.measured, query.distance(entry), sms_apart, path, entry.time_ms

        yield from ((path, entry) for path, entry, _ in sorted(fitting, key=rank))


# In order of preference: how well an entry fits, whether it was measured (None: either, measured first), and which.
_LEVELS = (
    (Source.EXACT, True, _exact),
    (Source.NEAREST, True, _nearest),
    (Source.EXACT, False, _exact),
    (Source.NEAREST, False, _nearest),
    (Source.SAME_ARCH, None, _same_architecture),
)


def _why(source: Source, entry: Entry, path: Path, query: _Query) -> str:
    where = f"{entry.provenance} at seqlen {entry.tuned.seqlen}, batch_heads {entry.tuned.batch_heads}"
    if entry.date:
        where += f" on {entry.date[:10]}"
    if source is Source.EXACT:
        return where
    if source is Source.SAME_ARCH:
        where += f" for {path.stem}, also of compute capability {query.device.compute_capability}"
    return f"{where}, {query.distance(entry):g} octaves from the bucket asked for"


def _why_none(query: _Query) -> str:
    """What is missing, and how the device's nearest entry differs, field by field."""
    own = [entry for _, entry in query.own_entries()]
    if not own:
        return f"nothing is tuned for {query.device.id}"
    asked = query.key.as_dict()

    def differences(entry: Entry) -> list[str]:
        fields = ((name, value) for name, value in entry.key.as_dict().items() if name in asked)
        return [f"{name} {value}, not {asked[name]}" for name, value in fields if value != asked[name]]

    nearest = min(own, key=lambda entry: (len(differences(entry)), query.distance(entry)))
    listed = differences(nearest)
    if not nearest.covers(query.seqlen, query.batch_heads):
        sizes = {"seqlen": query.seqlen, "batch_heads": query.batch_heads}
        listed += [
            f"valid for {name} {low} to {high}, not {sizes[name]}"
            for name, (low, high) in nearest.valid.items()
            if not low <= sizes[name] <= high
        ]
    what = f"nothing tuned for {query.device.id} fits {query.key.describe()} at seqlen {query.seqlen}, batch_heads "
    return f"{what}{query.batch_heads}" + (f"; the nearest entry differs: {', '.join(listed)}" if listed else "")


def _refused(refusals: dict[int, str]) -> str:
    if not refusals:
        return ""
    shown = list(refusals.values())[:_REFUSALS_SHOWN]
    more = len(refusals) - len(shown)
    return "; refused " + "; ".join(shown) + (f"; and {more} more" if more else "")


def _toolchain_note(entry: Entry, path: Path) -> str:
    """Say, and log once a file, that an entry was tuned with another minor version; it is used all the same."""
    names = ("torch", "triton") if entry.config.backend == "triton" else ("torch",)
    differ = [
        f"{name} {entry.toolchain[name]} (running {running})"
        for name in names
        if name in entry.toolchain and (running := _running(name)) and _minor(running) != _minor(entry.toolchain[name])
    ]
    if not differ:
        return ""
    note = f"tuned with {', '.join(differ)}"
    if path not in _reported_toolchains:
        _reported_toolchains.add(path)
        _log.info("%s: %s", path, note)
    return f"; {note}"


def _minor(version: str) -> list[str]:
    return str(version).split("+")[0].split(".")[:2]


@lru_cache(maxsize=None)
def _running(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
