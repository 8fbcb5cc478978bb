"""Every trial of a command as a line of JSON, for whoever studies searches or fits the model of times."""

from __future__ import annotations

import json
from pathlib import Path

from lla_compile.key import key_of
from lla_compile.spec import LLASpec
from lla_compile.tuner.session import KeyResult, Watcher
from lla_compile.tuner.study import Record


def following(watcher: Watcher, path: Path | None) -> Watcher:
    """``watcher``, with its trials appended to a file if there is one to append to."""
    return TrialsFile(path, watcher) if path else watcher


class TrialsFile:
    """A watcher that appends what it sees to a file, and passes it on.

    Args:
        path: the file; it is created if it does not exist.
        watcher: who else is told.
    """

    def __init__(self, path: Path, watcher: Watcher):
        self._path = path
        self._watcher = watcher
        self._spec: LLASpec | None = None
        path.open("a").close()  # an impossible place shows before anything is tuned

    def begin(self, spec: LLASpec, trials: int, finished: int) -> None:
        self._spec = spec
        self._watcher.begin(spec, trials, finished)

    def trial(self, record: Record) -> None:
        if not record.free:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(as_line(self._spec, record)) + "\n")
        self._watcher.trial(record)

    def end(self, result: KeyResult) -> None:
        self._watcher.end(result)


def as_line(spec: LLASpec, record: Record) -> dict:
    """A trial as the file has it: key and sizes, plan, and what of the outcome is set."""
    outcome = {name: value for name, value in record.outcome.as_dict().items() if value not in (None, "")}
    sizes = {"seqlen": spec.seqlen_k, "batch_heads": spec.batch_heads}
    return {"key": key_of(spec).describe(), **sizes, "plan": record.config.as_dict(), **outcome}
