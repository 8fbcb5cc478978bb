"""A few seconds of every backend against the float64 reference: does what is installed here compute the right thing?"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from dataclasses import dataclass, replace
from typing import Iterator, Mapping

import torch

from lla_compile.backends import Backend
from lla_compile.devices import DeviceInfo
from lla_compile.spec import PHASES, LLASpec
from lla_compile.tuner.evaluate import Evaluator
from lla_compile.tuner.outcome import DeviceLost, Kind, Outcome, one_line
from lla_compile.tuner.presets import PRESETS, Preset
from lla_compile.tuner.problem import Problem

HEAD_DIM, SEQLEN, HEADS = 64, 128, 2
_NOT_FINISHED = "not finished within the time of the self-test"


@dataclass(frozen=True)
class Check:
    """What became of one case.

    Attributes:
        backend, phase: which.
        status: "ok", "broken", or "no time" where it had not finished when the time was up.
        error, error_limit: the error nearest to its limit, as the tuner measures it; None without a result.
        median_ms: time of a launch, for orientation.
        message: what went wrong.
    """

    backend: str
    phase: str
    status: str
    error: float | None = None
    error_limit: float | None = None
    median_ms: float | None = None
    message: str = ""


def self_test(
    device: DeviceInfo, torch_device: torch.device, backends: Mapping[str, Backend], seconds: float
) -> list[Check]:
    """Check the default configuration of every backend in every phase, for at most about ``seconds``."""
    end = time.monotonic() + seconds
    cases = [
        (name, spec)
        for phase in PHASES
        for name, backend in backends.items()
        if backend.unsupported(spec := case(phase, device), device) is None
    ]
    return [_check(name, backends[name], Problem(spec, device, torch_device), end) for name, spec in cases]


def case(phase: str, device: DeviceInfo) -> LLASpec:
    """The small problem of a phase, in the type that the device is for."""
    dtype = "float32" if device.is_cpu else "bfloat16"
    if phase == "decode":
        return LLASpec.decoding(dtype, HEAD_DIM, SEQLEN, HEADS)
    return LLASpec.self_attention(dtype, HEAD_DIM, SEQLEN, HEADS, phase=phase)


def _check(name: str, backend: Backend, problem: Problem, end: float) -> Check:
    spec = problem.spec
    try:
        with _until(end):
            evaluator = Evaluator(problem, {name: backend}, _preset(problem.device))
            outcome = evaluator(backend.default_config(spec, problem.device))
    except TimeoutError as error:
        outcome = Outcome(Kind.TIMEOUT, str(error))
    except DeviceLost as error:
        outcome = Outcome(Kind.RUNTIME, f"the GPU's context is broken: {error}")
    except Exception as error:  # not a configuration's outcome: inputs or references could not be made
        outcome = Outcome(Kind.RUNTIME, one_line(error))
    # A compiler that is interrupted may say so in an error of its own.
    late = outcome.kind is Kind.TIMEOUT or outcome.kind is Kind.COMPILE and time.monotonic() >= end
    status = "ok" if outcome.kind is Kind.OK else "no time" if late else "broken"
    message = _NOT_FINISHED if late and outcome.kind is Kind.COMPILE else outcome.message
    return Check(name, spec.phase, status, outcome.error, outcome.error_limit, outcome.median_ms, message)


def _preset(device: DeviceInfo) -> Preset:
    quick = PRESETS["quick", "cpu" if device.is_cpu else "gpu"]
    return replace(quick, error_seqlen=SEQLEN, error_heads=HEADS, timing_ms=5.0, repeats=(1, 3), warm_up_ms=0.0)


@contextlib.contextmanager
def _until(end: float) -> Iterator[None]:
    """Raise TimeoutError inside once ``end`` has come: a compiler takes as long as it likes."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time of the self-test was up before")
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(number, frame):
        raise TimeoutError(_NOT_FINISHED)

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
