"""One configuration from plan to outcome: bind it, check its error, time it."""

from __future__ import annotations

import itertools
import math
import time
from typing import Callable, Mapping

import torch

from lla_compile.backends import Backend, Executable
from lla_compile.plans import KernelConfig, Plan, Source
from lla_compile.spec import LLASpec
from lla_compile.tuner.held_out import held_out
from lla_compile.tuner.outcome import DeviceLost, Kind, Outcome, one_line, outcome_of
from lla_compile.tuner.presets import Preset
from lla_compile.tuner.problem import Case, Problem
from lla_compile.tuner.timing import Launch, Timer, Timing, interleaved, timer_for, warm_up

# Times are taken at the operator's default ridge.
TIMED_RIDGE = 1.0


class Evaluator:
    """Runs configurations of one problem on its device.

    A trial checks and times the outputs of an ordinary call: kernels are compiled for the outputs that are asked for,
    and those kernels alone are compiled ahead. The rest is left to :meth:`verify`.

    Args:
        problem: what is tuned.
        backends: the backends that configurations may name; the first one's default runs the forward pass that a
            backward pass needs.
        preset: sizes of the held-out inputs and effort of the timing.
        timer: how a launch is timed; None takes the device's own.
    """

    def __init__(
        self, problem: Problem, backends: Mapping[str, Backend], preset: Preset, timer: Timer | None = None
    ):
        self._problem = problem
        self._backends = backends
        self._preset = preset
        self._timer = timer or timer_for(problem.torch_device, problem.device)
        self._timed = Case(problem.spec, problem.torch_device, "timed", self._bind_forward)
        self._held_out = held_out(problem, self._bind_forward, preset.error_seqlen, preset.error_heads)
        self._ridges = preset.error_ridges_of(problem.spec)
        self._timed_ridge = TIMED_RIDGE if problem.spec.solves else None
        self._warm = False

    def specs(self) -> tuple[LLASpec, ...]:
        """All that a configuration is compiled for: the timed problem and the held-out ones."""
        return (self._problem.spec, *(case.spec for case in self._held_out))

    def __call__(self, config: KernelConfig) -> Outcome:
        """Check and time a configuration.

        Raises:
            DeviceLost: the device answers no more; the configuration is to blame for it.
            RuntimeError: inputs or references cannot be made, whatever the configuration.
        """
        return self._outcome(lambda: self._evaluate(config))

    def verify(self, config: KernelConfig) -> Outcome | None:
        """Check all outputs of a configuration, also those that a trial leaves out; None if it leaves out none.

        Raises: as for a trial.
        """
        case = self._held_out[0]
        if set(case.checked) <= set(case.ordinary):
            return None
        return self._outcome(lambda: self._check(config, case.checked))

    def retime(self, configs: list[KernelConfig]) -> list[Timing]:
        """Time configurations that have been checked, in turns."""
        launches = [self._launch(config) for config in configs]
        return interleaved(self._timer, launches, self._preset.final_ms, self._preset.repeats)

    def iterations(self, config: KernelConfig) -> float:
        """The mean number of CG iterations in what is timed."""
        executable = self._bind(self._problem.spec, config)
        results = executable(_inputs(self._timed, self._timed_ridge, executable), ("out", "iterations"))
        return results["iterations"].float().mean().item()

    def _outcome(self, attempt: Callable[[], Outcome]) -> Outcome:
        self._prepare()
        try:
            return attempt()
        except Exception as error:  # a kernel fails in any way it likes; that is the trial's outcome
            outcome = outcome_of(error)
            self._require_device(outcome)
            return outcome

    def _evaluate(self, config: KernelConfig) -> Outcome:
        checked = self._check(config, self._timed.ordinary)
        if not checked.ok:
            return checked
        launch = self._launch(config)
        start = time.perf_counter()
        launch()
        synchronize(self._problem.torch_device)
        first = time.perf_counter() - start
        if first > self._preset.run_timeout_s:
            limit = self._preset.run_timeout_s
            return Outcome(Kind.TIMEOUT, f"one launch took {first:.1f} s, the limit is {limit:g} s")
        if not self._warm:
            warm_up(self._timer, launch, self._preset.warm_up_ms)
            self._warm = True
        timing = interleaved(self._timer, [launch], self._preset.timing_ms, self._preset.repeats)[0]
        return Outcome(Kind.OK, "", timing.median_ms, timing.spread, checked.error, checked.error_limit)

    def _prepare(self) -> None:
        """Make what all configurations share, so that none of them is blamed for it."""
        self._timed.inputs(self._timed_ridge)
        for case, ridge in itertools.product(self._held_out, self._ridges):
            case.reference(ridge)

    def _check(self, config: KernelConfig, wanted: tuple[str, ...]) -> Outcome:
        """Errors of ``wanted`` on the held-out inputs: the worst for its limit, or the first that breaks its limit."""
        worst = Outcome(Kind.OK, error=0.0, error_limit=math.inf)
        for case in self._held_out:
            executable = self._bind(case.spec, config)
            for ridge in self._ridges:
                name, error = case.worst(executable(_inputs(case, ridge, executable), wanted), ridge)
                limit = case.limit(ridge)
                where = f"N {case.spec.seqlen_k}" + ("" if ridge is None else f", ridge {ridge:g}")
                if not math.isfinite(error):
                    return Outcome(Kind.WRONG, f"{name} is not finite ({where})", error_limit=limit)
                if error > limit:
                    why = f"{name} has error {error:.1e}, the limit is {limit:.1e} ({where})"
                    return Outcome(Kind.WRONG, why, error=error, error_limit=limit)
                if error / limit >= worst.error / worst.error_limit:
                    worst = Outcome(Kind.OK, error=error, error_limit=limit)
        return worst

    def _bind_forward(self, spec: LLASpec) -> Executable:
        backend = next(iter(self._backends.values()))
        return self._bind(spec, backend.default_config(spec, self._problem.device))

    def _bind(self, spec: LLASpec, config: KernelConfig) -> Executable:
        plan = Plan(spec, self._problem.device, config, Source.REQUESTED, 0.0, "a trial of the tuner")
        return self._backends[config.backend].bind(plan)

    def _launch(self, config: KernelConfig) -> Launch:
        executable = self._bind(self._problem.spec, config)
        inputs, wanted = _inputs(self._timed, self._timed_ridge, executable), self._timed.ordinary
        return lambda: executable(inputs, wanted)

    def _require_device(self, outcome: Outcome) -> None:
        """Tell a failure of one launch from one that took the device's context with it."""
        try:
            synchronize(self._problem.torch_device)
            if outcome.kind is Kind.RESOURCES and self._problem.torch_device.type == "cuda":
                torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(outcome.message or one_line(error)) from error


def _inputs(case: Case, ridge: float | None, executable: Executable) -> dict[str, object]:
    """What an executable is called with.

    A decoding step gets its output and workspace from the caller, as a server gives them; they are filled with NaN, so
    that what is read but never written shows.
    """
    inputs = case.inputs(ridge)
    if case.spec.phase != "decode":
        return inputs
    q, v = inputs["q"], inputs["v"]
    out = q.new_full((*q.shape[:3], v.shape[3]), math.nan)
    workspace = q.new_full((executable.workspace_numel,), math.nan, dtype=torch.float32)
    return inputs | {"out": out, "workspace": workspace}


def synchronize(device: torch.device) -> None:
    """Wait for the device; raises RuntimeError if its context is broken."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
