"""Ctrl-C and SIGTERM, delivered only where nothing is half-recorded."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Remembers a signal and raises KeyboardInterrupt at a safe point; a second signal raises at once.

    An exception out of a signal handler can strike inside a transaction, or inside a finalizer that swallows it. So the
    handler raises by itself only in :meth:`prompt` sections, and :meth:`check` raises for a signal that came elsewhere.
    As a context manager it installs the handlers (in the main thread: no other may); otherwise it never raises.
    """

    def __init__(self):
        self._requested = False
        self._prompt = False
        self._previous: dict = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has come."""
        if self._requested:
            raise KeyboardInterrupt

    @contextmanager
    def prompt(self) -> Iterator[None]:
        """A section that a signal may end anywhere: it takes long and changes nothing that lasts."""
        self._prompt = True
        try:
            self.check()
            yield
        finally:
            self._prompt = False
        self.check()

    def _handle(self, number, frame) -> None:
        again, self._requested = self._requested, True
        if self._prompt or again:
            raise KeyboardInterrupt
