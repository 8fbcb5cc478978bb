"""Database files on disk: where they are, reading them safely and writing them whole.

Readers take no lock: a file is only ever replaced as a whole, so they see the old one or the new one. Writers take a
lock per file, read what is there, and replace it.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Callable, Iterable, Iterator, Mapping

from lla_compile.devices import DeviceInfo
from lla_compile.tuning_db import yaml_format
from lla_compile.tuning_db.document import DeviceHeader, Document, merged
from lla_compile.tuning_db.entry import Entry, newer

OVERLAY_VARIABLE = "LLA_COMPILE_TUNING_DB"
LOCK_TIMEOUT_S = 60.0

_log = logging.getLogger(__name__)
_cache: dict[Path, Document | None] = {}
_listings: dict[Path, tuple[Path, ...]] = {}


class DatabaseError(RuntimeError):
    """A database file cannot be read or written; the message says what to do."""


def overlay_dir() -> Path:
    """The user's own database, which goes before the shipped one: LLA_COMPILE_TUNING_DB, else the user data folder."""
    if chosen := os.environ.get(OVERLAY_VARIABLE):
        return Path(chosen).expanduser()
    return _user_data_dir()


def shipped_dir() -> Path:
    """The database that comes with the package."""
    return Path(__file__).parent


def device_file(directory: Path, device_id: str) -> Path:
    """The file of a device in a database directory."""
    return directory / f"{device_id}.yaml"


def read(path: Path) -> Document:
    """Parse one file.

    Raises:
        DatabaseError: it is not there, cannot be read, or is no database file of this schema.
    """
    try:
        return Document.from_dict(yaml_format.load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DatabaseError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise DatabaseError(f"cannot use {path}: {error}") from None


def load(path: Path) -> Document | None:
    """The file of a device, parsed once a process; None where there is none.

    A file that cannot be used is reported by one warning and treated as absent.
    """
    if path not in _cache:
        _cache[path] = _load(path)
    return _cache[path]


def load_all(directory: Path) -> dict[Path, Document]:
    """All usable files of a database directory, by path; listed once a process."""
    if directory not in _listings:
        paths = directory.glob("*.yaml") if directory.is_dir() else ()
        _listings[directory] = tuple(sorted(p for p in paths if p.name != "devices.yaml" and p.name[0] != "."))
    documents = {path: load(path) for path in _listings[directory]}
    return {path: document for path, document in documents.items() if document is not None}


def clear_cache() -> None:
    """Forget what was read: for other processes' writes to be seen."""
    _cache.clear()
    _listings.clear()


def record(
    device: DeviceInfo, entries: Iterable[Entry], toolchain: Mapping | None = None, path: Path | None = None
) -> Path:
    """Add entries to a device's file, by default in the overlay.

    Where a slot (key, tuned bucket and backend) is taken, a predicted entry never replaces a measured one, and otherwise the
    newest stays.

    Args:
        device: what the entries are for.
        entries: what to add.
        toolchain: versions for the entries that carry none, e.g. {"torch": "2.11.0", "triton": "3.6.0"}.
        path: the file to write.

    Returns:
        The file.

    Raises:
        DatabaseError: the file cannot be written, is not a database file, or is for another device.
        ValueError: an entry breaks the schema.
    """
    path = device_file(overlay_dir(), device.id) if path is None else Path(path)
    header = DeviceHeader.of(device)

    def add(old: Document | None) -> Document:
        document = old or Document(header)
        if document.device.identity != header.identity:
            there, here = (f"{h.id} with {h.sms} SMs" for h in (document.device, header))
            raise DatabaseError(f"{path} is for {there}, not for {here}; choose another file")
        for entry in entries:
            document = document.with_entry(entry if entry.toolchain else replace(entry, toolchain=versions), newer)
        return document

    versions = dict(toolchain or {})
    update(path, add)
    return path


def merge(out: Path, paths: Iterable[Path]) -> Document:
    """Write to ``out`` all entries of the files, and those of ``out`` itself if it exists.

    Where several are for one slot, measured goes before predicted, then the lower median_ms, and the one that stays
    lists what all of them had found. The order of files is irrelevant.

    Raises:
        DatabaseError: a file cannot be read or written, or they are for different devices.
    """
    documents = [read(Path(path)) for path in paths]

    def combine(old: Document | None) -> Document:
        try:
            return merged(documents if old is None else [old, *documents])
        except ValueError as error:
            raise DatabaseError(f"cannot merge into {out}: {error}") from None

    return update(Path(out), combine)


def update(path: Path, change: Callable[[Document | None], Document]) -> Document:
    """Replace a file by ``change`` of what it holds (None if absent): all of it or nothing, under the file's lock.

    Raises:
        DatabaseError: what is there is not a database file, or nothing can be written there.
        ValueError: the new content breaks the schema.
    """
    with _locked(path):
        try:
            document = change(read(path) if path.exists() else None)
        except DatabaseError as error:
            raise DatabaseError(f"{error}; left as it is") from None
        content = document.to_dict()
        if problems := schema_problems(content):
            raise ValueError(f"refusing to write {path}: {problems[0]}")
        _replace(path, yaml_format.dump(content))
    _cache.pop(path, None)
    _listings.pop(path.parent, None)
    return document


def schema_problems(content) -> list[str]:
    """Where the content of a file breaks the JSON Schema; one line each."""
    errors = sorted(_validator().iter_errors(content), key=lambda error: [str(part) for part in error.absolute_path])
    return [f"{error.json_path.removeprefix('$.')}: {error.message}" for error in errors]


def _load(path: Path) -> Document | None:
    try:
        path.stat()
        document = read(path)
        if document.device.id != path.stem:
            raise DatabaseError(f"cannot use {path}: it is for device {document.device.id}, not {path.stem}")
    except FileNotFoundError:
        return None
    except (DatabaseError, OSError) as error:
        _log.warning("%s; skipped (see `lla-compile db verify`)", error)
        return None
    return document


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_TIMEOUT_S):
            yield
    except Timeout:
        raise DatabaseError(f"cannot write {path}: locked by another process for {LOCK_TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise DatabaseError(
            f"cannot write {path}: {error.strerror or error}; set {OVERLAY_VARIABLE} to a directory you can write to"
        ) from None


def _replace(path: Path, text: str) -> None:
    """Put ``text`` at ``path`` at once and for good; the caller holds the lock, so the temporary name is free."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@lru_cache(maxsize=None)
def _user_data_dir() -> Path:
    from platformdirs import user_data_dir

    return Path(user_data_dir("lla_compile", appauthor=False))


@lru_cache(maxsize=None)
def _validator():
    from jsonschema import Draft202012Validator

    return Draft202012Validator(json.loads((Path(__file__).parent / "schema.json").read_text(encoding="utf-8")))
