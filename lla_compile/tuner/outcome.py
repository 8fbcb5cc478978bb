"""What became of one configuration, as a value: a search records failures, it never dies of them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import Enum

from lla_compile.backends import CompileError


class Kind(str, Enum):
    """How a trial ended; all but OK are counted by name in an entry's ``search.failed``."""

    OK = "ok"
    COMPILE = "compile"
    RESOURCES = "resources"
    TIMEOUT = "timeout"
    WRONG = "wrong"
    RUNTIME = "runtime"


FAILURES = tuple(kind for kind in Kind if kind is not Kind.OK)

# Violation of a configuration that gave no answer: above that of any wrong answer that is still a number.
NO_ANSWER = 1000.0


class DeviceLost(RuntimeError):
    """The device's context is broken: nothing more can be launched in this process."""


# Raised by Triton's launcher and by PyTorch's allocator; matched by name so that neither has to be imported.
_RESOURCE_ERRORS = ("OutOfResources", "OutOfMemoryError")


@dataclass(frozen=True)
class Outcome:
    """The record of one configuration.

    Attributes:
        kind: how it ended.
        message: why, in one line, unless OK.
        median_ms: median time of a launch, or its prediction; set when OK.
        spread: interquartile range of the times over their median; set when OK.
        error: error nearest to (or furthest beyond) its limit; None when there is no finite one, or when the time is
            predicted.
        error_limit: the limit that ``error`` is held against.
    """

    kind: Kind
    message: str = ""
    median_ms: float | None = None
    spread: float | None = None
    error: float | None = None
    error_limit: float | None = None

    @property
    def ok(self) -> bool:
        return self.kind is Kind.OK

    @property
    def violation(self) -> float:
        """The search's constraint, satisfied at <= 0: error / limit - 1, or 0 where nothing ran that could be wrong."""
        if self.ok and self.error is None:
            return 0.0
        if self.kind not in (Kind.OK, Kind.WRONG) or self.error is None or not math.isfinite(self.error):
            return NO_ANSWER
        return min(self.error / self.error_limit - 1, NO_ANSWER)

    def as_dict(self) -> dict:
        return asdict(self) | {"kind": self.kind.value}

    @classmethod
    def from_dict(cls, values: dict) -> Outcome:
        return cls(**(values | {"kind": Kind(values["kind"])}))


def outcome_of(error: Exception) -> Outcome:
    """The outcome that an exception stands for."""
    return Outcome(_kind_of(error), one_line(error))


def one_line(error: BaseException, width: int = 200) -> str:
    """An exception's type and message on a single line."""
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= width else text[: width - 1] + "…"


def _kind_of(error: BaseException) -> Kind:
    chain: BaseException | None = error
    while chain is not None:
        if type(chain).__name__ in _RESOURCE_ERRORS or isinstance(chain, MemoryError):
            return Kind.RESOURCES
        chain = chain.__cause__
    # Triton raises its own CompilationError where a backend compiles at the first launch.
    if isinstance(error, CompileError) or type(error).__name__ == "CompilationError":
        return Kind.COMPILE
    return Kind.TIMEOUT if isinstance(error, TimeoutError) else Kind.RUNTIME
