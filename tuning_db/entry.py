"""One tuned plan: what it is for, what it is, and how it was found."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from typing import Mapping

from lla_compile.key import Bucket, TuningKey, bucket_of
from lla_compile.plans import KernelConfig
from lla_compile.spec import OPS, SOLVING_OPS, LLASpec

PROVENANCES = ("measured", "predicted")

_PASSES_BESIDE_CG = 3  # over keys or values
_FIGURES = ("median_ms", "default_ms", "error", "predicted_ms")  # what an origin keeps


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
        origins: where entries of several hosts were merged, what each of them had found; else empty.

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
    origins: tuple[dict, ...] = ()

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
        capped = self.config.cg_max_iters is not None
        if self.key.op in OPS and capped != (self.key.op in SOLVING_OPS):
            raise ValueError(f"a plan of op {self.key.op} has {'no' if capped else 'a'} cg_max_iters")

    @property
    def slot(self) -> tuple[TuningKey, Bucket, str]:
        """What at most one entry of a file may be for: each backend has its own, so that one that is missing on a
        machine leaves the best of the others."""
        return self.key, self.tuned, self.config.backend

    @property
    def time_ms(self) -> float:
        """Of the plan, as measured or predicted."""
        return self.result.get("median_ms", self.result.get("predicted_ms", float("inf")))

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

    def spec(self) -> LLASpec:
        """The problem that was tuned: that of its bucket.

        Raises:
            ValueError: the key names something that does not exist; the message says what.
        """
        key = self.key
        sizes = key.dtype, key.head_dim, self.tuned.seqlen, self.tuned.batch_heads, key.head_dim_v
        fields = {"op": key.op, "precision": key.precision, "is_causal": key.causal}
        if key.phase == "decode":
            return LLASpec.decoding(*sizes, group_size=key.group or 1, **fields)
        return LLASpec.self_attention(*sizes, phase=key.phase, **fields)

    def origin(self) -> dict:
        """What an entry that this one is merged with remembers of it."""
        figures = {name: self.result[name] for name in _FIGURES if name in self.result}
        return {
            "provenance": self.provenance,
            "plan": self.config.as_dict(),
            **figures,
            "date": self.date,
            "toolchain": dict(self.toolchain),
        }

    def to_dict(self) -> dict:
        """The entry as a file holds it, but for the toolchain; inverse of :meth:`from_dict`."""
        origins = {"origins": [dict(origin) for origin in self.origins]} if self.origins else {}
        return {
            "key": self.key.as_dict(),
            "valid": {name: list(bounds) for name, bounds in self.valid.items()},
            "tuned": {"seqlen": self.tuned.seqlen, "batch_heads": self.tuned.batch_heads},
            "plan": self.config.as_dict(),
            "provenance": self.provenance,
            "result": dict(self.result),
            "search": dict(self.search),
            **origins,
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
                origins=tuple(dict(origin) for origin in data.get("origins", ())),
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
        return (*values, self.tuned.seqlen, self.tuned.batch_heads, self.config.backend)


def newer(old: Entry, new: Entry) -> Entry:
    """Which of two entries for one slot stays when ``new`` is recorded: measured before predicted, then the newest."""
    if old.measured != new.measured:
        return old if old.measured else new
    return old if old.date > new.date else new


def better(a: Entry, b: Entry) -> Entry:
    """The entry that a merge of two for one slot gives: the better one, with what both had found as its ``origins``.

    Measured goes before predicted, then the newer model's prediction, then the faster, then the newer. The result
    depends neither on the order of the arguments nor on how several merges are nested, and an entry merged with itself
    is itself.
    """
    origins = {_canonical(origin): origin for e in (a, b) for origin in e.origins or (e.origin(),)}
    listed = tuple(origins[text] for text in sorted(origins)) if len(origins) > 1 else ()
    return replace(min((a, b), key=_rank), origins=listed)


def _rank(entry: Entry) -> tuple:
    """Sorts entries of one slot, the best first; entries that differ never compare equal."""
    newest_first = [*(-ord(letter) for letter in entry.date), 0]
    text = _canonical([replace(entry, origins=()).to_dict(), entry.toolchain])
    return not entry.measured, -entry.search.get("model_version", 0), entry.time_ms, newest_first, text


def _canonical(content) -> str:
    return json.dumps(content, sort_keys=True)


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
