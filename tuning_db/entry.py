"""One tuned plan: what it is for, what it is, and how it was found."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from typing import Mapping

from lla_compile.key import Bucket, TuningKey, bucket_of
from lla_compile.plans import KernelConfig

PROVENANCES = ("measured", "predicted")

_PASSES_BESIDE_CG = 3  # over keys or values


@dataclass(frozen=True)
class Entry:
    """One entry of a database file.

    Args:
        key: what must be equal for the plan to be meaningful.
        valid: inclusive ranges of "seqlen" and "batch_heads" in which the plan may stand in for its neighbours.
        tuned: the bucket at which it was tuned.
        config: the winner.
        provenance: "measured" on the device, or "predicted" by a model.
        result: median_ms, spread, default_ms (the heuristic default in the same run), error, error_limit; where
            nothing was measured predicted_ms and predicted_default_ms instead of all these; and where a decoding plan
            reads the cache once, ``streaming``: plan, median_ms, iterations and kernel_hash of the best
            that reads it once an iteration.
        search: trials, failed, seed, date (ISO 8601, UTC), kernel_hash, and where times were predicted model_version.
        toolchain: versions that it was tuned with; written once a file where its entries agree.

    Raises:
        ValueError: a range is missing or empty, a field has the wrong type, or the provenance is unknown.
    """

    key: TuningKey
    valid: Mapping[str, tuple[int, int]]
    tuned: Bucket
    config: KernelConfig
    provenance: str
    result: dict
    search: dict
    toolchain: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.provenance not in PROVENANCES:
            raise ValueError(f"provenance must be one of {', '.join(PROVENANCES)}, got {self.provenance!r}")
        ranges = {}
        for size in ("seqlen", "batch_heads"):
            low, high = _pair(size, self.valid.get(size))
            ranges[size] = (low, high)
        object.__setattr__(self, "valid", ranges)
        for part in (self.key, self.tuned, self.config):
            _check_types(part)

    @property
    def slot(self) -> tuple[TuningKey, Bucket]:
        """What at most one entry of a file may be for."""
        return self.key, self.tuned

    @property
    def measured(self) -> bool:
        return self.provenance == "measured"

    @property
    def date(self) -> str:
        """When it was found; ISO 8601 in UTC, so that text order is time order. "" where unknown."""
        return str(self.search.get("date", ""))

    def covers(self, seqlen: int, batch_heads: int) -> bool:
        """Whether these sizes lie in the validity range."""
        sizes = {"seqlen": seqlen, "batch_heads": batch_heads}
        return all(low <= sizes[name] <= high for name, (low, high) in self.valid.items())

    def for_iterations(self, cap: int | None) -> Entry:
        """The entry for calls that allow ``cap`` iterations: with the streaming plan where that is then the faster one.

        It reads the keys for the statistics, once an iteration, and with the values (as much again) for the output.
        """
        streaming = self.result.get("streaming")
        if cap is None or streaming is None or cap >= streaming["iterations"]:
            return self
        expected = streaming["median_ms"] * (cap + _PASSES_BESIDE_CG) / (streaming["iterations"] + _PASSES_BESIDE_CG)
        if expected >= self.result["median_ms"]:
            return self
        search = self.search | {"kernel_hash": streaming["kernel_hash"]}
        return replace(self, config=KernelConfig.from_dict(streaming["plan"]), search=search)

    def to_dict(self) -> dict:
        """The entry as a file holds it, but for the toolchain; inverse of :meth:`from_dict`."""
        return {
            "key": self.key.as_dict(),
            "valid": {name: list(bounds) for name, bounds in self.valid.items()},
            "tuned": {"seqlen": self.tuned.seqlen, "batch_heads": self.tuned.batch_heads},
            "plan": self.config.as_dict(),
            "provenance": self.provenance,
            "result": dict(self.result),
            "search": dict(self.search),
        }

    @classmethod
    def from_dict(cls, data: Mapping, toolchain: Mapping) -> Entry:
        """The entry of a file whose header names ``toolchain``.

        Raises:
            ValueError: something is missing, unknown or of the wrong type.
        """
        try:
            return cls(
                key=TuningKey(**data["key"]),
                valid=data["valid"],
                tuned=_bucket(data["tuned"]),
                config=KernelConfig.from_dict(data["plan"]),
                provenance=data["provenance"],
                result=dict(data["result"]),
                search=dict(data["search"]),
                toolchain={name: str(version) for name, version in data.get("toolchain", toolchain).items()},
            )
        except KeyError as error:
            raise ValueError(f"an entry has no {error.args[0]!r}") from None
        except (TypeError, AttributeError) as error:
            raise ValueError(f"an entry is malformed: {error}") from None

    def describe(self) -> str:
        """The slot in one line."""
        return f"{self.key.describe()}, seqlen {self.tuned.seqlen}, batch_heads {self.tuned.batch_heads}"

    def order(self) -> tuple:
        """Sort key of the entries of a file: by slot, field by field."""
        values = [getattr(self.key, f.name) for f in fields(self.key)]
        values = [0 if value is None else value for value in values]
        return (*values, self.tuned.seqlen, self.tuned.batch_heads)


def newer(old: Entry, new: Entry) -> Entry:
    """Which of two entries for one slot stays when ``new`` is recorded: measured before predicted, then the newest."""
    if old.measured != new.measured:
        return old if old.measured else new
    return old if old.date > new.date else new


def better(a: Entry, b: Entry) -> Entry:
    """Which of two entries for one slot a merge keeps: measured before predicted, then the faster, then the newer.

    Of two predictions it is that of the newer model, whatever the times. The choice does not depend on the order of the
    arguments.
    """
    a, b = sorted((a, b), key=lambda e: json.dumps([e.to_dict(), e.toolchain], sort_keys=True))
    if a.measured != b.measured:
        return a if a.measured else b
    model_a, model_b = (e.search.get("model_version", 0) for e in (a, b))
    if model_a != model_b:
        return a if model_a > model_b else b
    time_a, time_b = (e.result.get("median_ms", e.result.get("predicted_ms", float("inf"))) for e in (a, b))
    if time_a != time_b:
        return a if time_a < time_b else b
    return a if a.date >= b.date else b


def _check_types(part) -> None:
    """A file may hold anything: refuse here what would fail far away, inside a kernel's generator."""
    types = {"str": str, "int": int, "bool": bool}
    for f in fields(part):
        value, expected = getattr(part, f.name), types[f.type.partition(" ")[0]]
        if type(value) is not expected and not (value is None and f.type.endswith("None")):
            raise ValueError(f"{f.name} must be {expected.__name__}, got {value!r}")
        if expected is int and value is not None and value < 1:
            raise ValueError(f"{f.name} must be positive, got {value!r}")


def _pair(name: str, bounds) -> tuple[int, int]:
    if not (isinstance(bounds, (list, tuple)) and len(bounds) == 2 and all(type(b) is int for b in bounds)):
        raise ValueError(f"valid.{name} must be two integers [lowest, highest], got {bounds!r}")
    low, high = bounds
    if not 0 <= low <= high:
        raise ValueError(f"valid.{name} must be a range with 0 <= lowest <= highest, got {bounds!r}")
    return low, high


def _bucket(sizes: Mapping) -> Bucket:
    bucket = Bucket(sizes["seqlen"], sizes["batch_heads"])
    if bucket != bucket_of(bucket.seqlen, bucket.batch_heads):
        raise ValueError(f"tuned sizes must be those of a bucket (powers of two), got {dict(sizes)}")
    return bucket
