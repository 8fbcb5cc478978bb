"""One configuration from plan to outcome: bind it, check its error, time it."""

from __future__ import annotations

import math
import time
from typing import Mapping

import torch

from lla_compile.backends import Backend, Executable
from lla_compile.plans import KernelConfig, Plan, Source
from lla_compile.spec import LLASpec
from lla_compile.tuner.outcome import DeviceLost, Kind, Outcome, one_line, outcome_of
from lla_compile.tuner.presets import Preset
from lla_compile.tuner.problem import HeldOut, Problem, held_out
from lla_compile.tuner.timing import Launch, Timer, Timing, interleaved, timer_for, warm_up

# Times are taken at the operator's default ridge.
TIMED_RIDGE = 1.0


class Evaluator:
    """Runs configurations of one problem on its device.

    Args:
        problem: what is tuned.
        backends: the backends that configurations may name.
        preset: sizes of the held-out inputs and effort of the timing.
        timer: how a launch is timed; None takes the device's own.
    """

    def __init__(
        self, problem: Problem, backends: Mapping[str, Backend], preset: Preset, timer: Timer | None = None
    ):
        self._problem = problem
        self._backends = backends
        self._preset = preset
        self._timer = timer or timer_for(problem.torch_device, problem.device.l2_bytes)
        self._inputs = problem.inputs()
        self._held_out = held_out(problem, preset.error_seqlen, preset.error_heads, preset.error_ridges)
        self._warm = False

    def specs(self) -> tuple[LLASpec, ...]:
        """All that a configuration is compiled for: the timed problem and the held-out ones."""
        return (self._problem.spec, *(case.spec for case in self._held_out))

    def __call__(self, config: KernelConfig) -> Outcome:
        """Check and time a configuration.

        Raises:
            DeviceLost: the device answers no more; the configuration is to blame for it.
        """
        try:
            return self._evaluate(config)
        except Exception as error:  # a kernel fails in any way it likes; that is the trial's outcome
            outcome = outcome_of(error)
            self._require_device(outcome)
            return outcome

    def retime(self, configs: list[KernelConfig]) -> list[Timing]:
        """Time configurations that have been checked, in turns."""
        launches = [self._launch(config) for config in configs]
        return interleaved(self._timer, launches, self._preset.final_ms, self._preset.repeats)

    def _evaluate(self, config: KernelConfig) -> Outcome:
        checked = self._check(config)
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

    def _check(self, config: KernelConfig) -> Outcome:
        """Errors on the held-out inputs against their limits: the worst, or the first that breaks its limit."""
        worst = Outcome(Kind.OK, error=0.0, error_limit=math.inf)
        for case in self._held_out:
            executable = self._bind(case.spec, config)
            for ridge in self._preset.error_ridges:
                output, _, _ = executable(*case.inputs, ridge, case.spec.head_dim**-0.5, False)
                error, limit = case.error(output, ridge), case.limit(ridge)
                where = f"N {case.spec.seqlen_q}, ridge {ridge:g}"
                if not math.isfinite(error):
                    return Outcome(Kind.WRONG, f"the output is not finite ({where})", error_limit=limit)
                if error > limit:
                    why = f"error {error:.1e}, the limit is {limit:.1e} ({where})"
                    return Outcome(Kind.WRONG, why, error=error, error_limit=limit)
                if error / limit >= worst.error / worst.error_limit:
                    worst = Outcome(Kind.OK, error=error, error_limit=limit)
        return worst

    def _bind(self, spec: LLASpec, config: KernelConfig) -> Executable:
        plan = Plan(spec, self._problem.device, config, Source.REQUESTED, 0.0, "a trial of the tuner")
        return self._backends[config.backend].bind(plan)

    def _launch(self, config: KernelConfig) -> Launch:
        executable = self._bind(self._problem.spec, config)
        scale = self._problem.spec.head_dim**-0.5
        return lambda: executable(*self._inputs, TIMED_RIDGE, scale, False)

    def _require_device(self, outcome: Outcome) -> None:
        """Tell a failure of one launch from one that took the device's context with it."""
        try:
            synchronize(self._problem.torch_device)
            if outcome.kind is Kind.RESOURCES and self._problem.torch_device.type == "cuda":
                torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(outcome.message or one_line(error)) from error


def synchronize(device: torch.device) -> None:
    """Wait for the device; raises RuntimeError if its context is broken."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
