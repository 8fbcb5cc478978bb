"""Winners into the tuning database, and the neighbours' winners out of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Sequence

from lla_compile.devices import DeviceInfo
from lla_compile.key import Bucket, bucket_of_spec, key_of
from lla_compile.plans import KernelConfig
from lla_compile.prediction import efficiency
from lla_compile.tuner.outcome import Outcome
from lla_compile.tuner.problem import Problem
from lla_compile.tuner.search import failures
from lla_compile.tuner.space import SearchSpace
from lla_compile.tuner.study import Decision, Record
from lla_compile.tuner.toolchain import compilers, toolchain
from lla_compile.tuning_db import DatabaseError, Entry, device_file, overlay_dir, record, store


def make_entry(
    problem: Problem, space: SearchSpace, decision: Decision, records: Sequence[Record], seed: int
) -> Entry:
    """The database entry of a decided search."""
    result = round_result(decision.outcome, decision.default_ms)
    if (streaming := decision.streaming) is not None:
        result["streaming"] = {
            "plan": streaming.config.as_dict(),
            "median_ms": round(streaming.median_ms, 6),
            "iterations": round(streaming.iterations, 2),
            "kernel_hash": _kernel_hash(problem, space, streaming.config),
        }
    found = _search_of(problem, space, decision, records, seed)
    return _entry(problem, decision, "measured", result, found, toolchain(problem.torch_device.type))


def round_result(outcome: Outcome, default_ms: float | None) -> dict:
    """The figures of a correct outcome as an entry carries them."""
    result = {
        "median_ms": round(outcome.median_ms, 6),
        "spread": round(outcome.spread, 4),
        "error": float(f"{outcome.error:.4g}"),
        "error_limit": outcome.error_limit,
    }
    if default_ms is not None:
        result["default_ms"] = round(default_ms, 6)
    return result


def make_predicted_entry(
    problem: Problem, space: SearchSpace, decision: Decision, records: Sequence[Record], seed: int
) -> Entry:
    """The same of a search whose times were predicted: they are called so, and there is no error."""
    result = {"predicted_ms": float(f"{decision.outcome.median_ms:.4g}")}
    if decision.default_ms is not None:
        result["predicted_default_ms"] = float(f"{decision.default_ms:.4g}")
    found = _search_of(problem, space, decision, records, seed) | {"model_version": efficiency.VERSION}
    return _entry(problem, decision, "predicted", result, found, compilers([decision.config.backend]))


def _entry(
    problem: Problem, decision: Decision, provenance: str, result: dict, search: dict, versions: dict[str, str]
) -> Entry:
    bucket = bucket_of_spec(problem.spec)
    return Entry(
        key=key_of(problem.spec),
        valid=validity(bucket, problem.spec.phase),
        tuned=bucket,
        config=decision.config,
        provenance=provenance,
        result=result,
        search=search,
        toolchain=versions,
    )


def _search_of(
    problem: Problem, space: SearchSpace, decision: Decision, records: Sequence[Record], seed: int
) -> dict:
    return {
        "trials": decision.trials,
        "failed": failures(records),
        "seed": seed,
        "date": decision.date,
        "kernel_hash": _kernel_hash(problem, space, decision.config),
    }


def _kernel_hash(problem: Problem, space: SearchSpace, config: KernelConfig) -> str:
    return space.backends[config.backend].source_hash(problem.spec, config)


def validity(bucket: Bucket, phase: str) -> dict[str, tuple[int, int]]:
    """Where a plan may stand in: its own bucket of lengths, and batches that fill the device about as well.

    A decoding plan cuts the keys into as many parts as fill the device. Longer caches and larger batches keep it full,
    so that it may stand in for the next larger bucket of both; smaller ones would leave it idle.
    """
    if phase == "decode":
        larger = Bucket(2 * bucket.seqlen, 2 * bucket.batch_heads)
        return {
            "seqlen": (bucket.seqlen_range()[0], larger.seqlen_range()[1]),
            "batch_heads": (bucket.batch_heads_range()[0], larger.batch_heads_range()[1]),
        }
    return {
        "seqlen": bucket.seqlen_range(),
        "batch_heads": (max(1, bucket.batch_heads // 4), bucket.batch_heads * 16),
    }


def out_file(out: Path | None, device_id: str) -> Path:
    """The database file that ``--out`` means: a YAML file, or a directory; None is the user overlay."""
    if out is None:
        return device_file(overlay_dir(), device_id)
    return out if out.suffix in (".yaml", ".yml") else device_file(out, device_id)


def require_writable(path: Path, device: DeviceInfo) -> None:
    """Refuse a file that a winner could not be written to, before time is spent on finding one.

    Raises:
        DatabaseError: it is in a read-only place, not a database file, or for another device.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        reason = "is read-only" if folder.is_dir() else "is not a directory"
        raise DatabaseError(f"cannot write {path}: {folder} {reason}; choose another place with --out")
    if path.exists() and (there := store.read(path).device.id) != device.id:
        raise DatabaseError(f"{path} is for {there}, not for {device.id}; choose another file with --out")


def write(problem: Problem, entry: Entry, path: Path) -> None:
    """Add an entry to a database file.

    Raises:
        DatabaseError: it cannot be written; the message says what to do.
    """
    record(problem.device, [entry], path=path)


def neighbours(problem: Problem, limit: int = 3) -> list[KernelConfig]:
    """Winners of the same device for keys that differ least: worth trying early."""
    key, bucket = key_of(problem.spec), bucket_of_spec(problem.spec)

    def distance(entry: Entry) -> tuple:
        differing = sum(getattr(entry.key, name) != value for name, value in key.as_dict().items())
        return differing, entry.tuned.distance(bucket)

    entries: list[Entry] = []
    for directory in (overlay_dir(), store.shipped_dir()):
        if document := store.load(device_file(directory, problem.device.id)):
            entries += [e for e in document.entries if (e.key.op, e.key.phase) == (key.op, key.phase)]
    return list(dict.fromkeys(entry.config for entry in sorted(entries, key=distance)))[:limit]
