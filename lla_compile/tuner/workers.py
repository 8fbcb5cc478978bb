"""The processes that share a study: each gives a sign of life, and notices when another stops giving one.

Optuna's own heartbeat serves relational databases alone, and `Study.optimize` alone. A counter among the attributes
of the study works in every storage, the journal file and Redis included. What counts is that it changes, not what the
clock of another host says.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from functools import lru_cache
from typing import Hashable, Iterator

import optuna

_OWNER = "owner"

# Seconds between two signs of life, and without any until a process is taken for dead: one that swaps or whose
# storage is slow misses a few.
_BEAT_S = 5.0
_GRACE_S = 30.0


class Workers:
    """The processes at work on one study."""

    def __init__(self, study: optuna.Study):
        self._study = study
        self._beats: dict[str, int] = {}
        self._last_change: dict[Hashable, tuple[int | None, float]] = {}

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Give signs of life of this process meanwhile."""
        end = threading.Event()
        self._study.set_user_attr(_beat_key(_this_process()), 0)
        thread = threading.Thread(target=self._beat, args=(end,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    def sign(self, trial: optuna.Trial) -> None:
        """Make a running trial this process's own."""
        trial.set_user_attr(_OWNER, list(_this_process()))

    def owns(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether a running trial is this process's own."""
        return trial.user_attrs.get(_OWNER) == list(_this_process())

    def refresh(self) -> None:
        """Read the signs of life of all processes."""
        self._beats = {key: value for key, value in self._study.user_attrs.items() if key.startswith(_beat_key())}

    def lost(self, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether the process of a running trial is dead: at once on this host, elsewhere after a time of silence."""
        owner = trial.user_attrs.get(_OWNER)
        if owner and owner[0] == _this_process()[0] and not _is_alive(owner[1]):
            return True
        # A trial without an owner has just begun, or its process died in that moment.
        subject, beat = (tuple(owner), self._beats.get(_beat_key(owner))) if owner else (trial.number, None)
        last, since = self._last_change.get(subject, (None, None))
        if since is None or last != beat:
            self._last_change[subject] = beat, time.monotonic()
            return False
        return time.monotonic() - since > _GRACE_S

    def _beat(self, end: threading.Event) -> None:
        count = 0
        while not end.wait(_BEAT_S):
            count += 1
            # A storage that cannot be reached stops the search itself, in the thread that has something to lose.
            with contextlib.suppress(Exception):
                self._study.set_user_attr(_beat_key(_this_process()), count)


def _beat_key(owner: tuple[str, int] | None = None) -> str:
    return "alive " + ("" if owner is None else f"{owner[0]} {owner[1]}")


def _this_process() -> tuple[str, int]:
    return _host(), os.getpid()


@lru_cache(maxsize=None)
def _host() -> str:
    """Where process numbers mean what they mean here: containers may share a host's name and not its processes."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
