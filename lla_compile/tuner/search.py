"""The search of one key: propose, compile ahead, evaluate, record; then compare the best with the default."""

from __future__ import annotations

import datetime
import itertools
import time
from collections import deque
from dataclasses import dataclass
from typing import Callable, Iterable, Protocol

from lla_compile.plans import STREAMING_SCHEDULES, KernelConfig
from lla_compile.tuner.interruption import Interruption
from lla_compile.tuner.outcome import FAILURES, DeviceLost, Kind, Outcome
from lla_compile.tuner.space import SearchSpace
from lla_compile.tuner.study import STARTUP_TRIALS, Decision, Proposal, Record, Streaming, TuningStudy, retimed
from lla_compile.tuner.timing import Timing

# Proposals in a row that turn out infeasible or known, after which an untried configuration is taken at random.
_PATIENCE = 5

# Seconds between two looks at what other processes have finished, where they hold all that is left.
_POLL_S = 0.2


class Evaluate(Protocol):
    """What a search needs of an evaluator."""

    def __call__(self, config: KernelConfig) -> Outcome:
        """Check and time one configuration."""

    def verify(self, config: KernelConfig) -> Outcome | None:
        """Check what a trial does not; None if there is nothing."""

    def retime(self, configs: list[KernelConfig]) -> list[Timing]:
        """Time configurations again, in turns."""

    def iterations(self, config: KernelConfig) -> float:
        """The mean number of CG iterations that a configuration of phase "decode" takes."""


class Compiler(Protocol):
    """What a search needs of a compile pool."""

    def submit(self, config: KernelConfig) -> None:
        """Start compiling."""

    def result(self, config: KernelConfig) -> Outcome | None:
        """Wait; None if it compiled."""


class CompileInPlace:
    """The compiler of backends that compile nothing, or when they are bound."""

    def submit(self, config: KernelConfig) -> None:
        """Nothing to start."""

    def result(self, config: KernelConfig) -> None:
        return None


@dataclass(frozen=True)
class Budget:
    """When a search ends.

    Attributes:
        trials: configurations evaluated, those of a resumed study and of other processes included; each process may
            take the last one.
        deadline: time.monotonic() after which nothing new is evaluated.
        finalists: configurations compared with the default at the end.
    """

    trials: int
    deadline: float
    finalists: int


class Search:
    """The search of one key.

    Args:
        study: proposals and records.
        space: feasibility and the default.
        evaluate: turns a configuration into an outcome.
        budget: when to end.
        compiler: compiles ahead of evaluation.
        lookahead: proposals in flight, so that many compile at a time; 1 lets each learn from all earlier ones.
        report: called with each finished record.
        interruption: ends the search between two records.
    """

    def __init__(
        self,
        study: TuningStudy,
        space: SearchSpace,
        evaluate: Evaluate,
        budget: Budget,
        compiler: Compiler | None = None,
        lookahead: int = 1,
        report: Callable[[Record], None] = lambda record: None,
        interruption: Interruption | None = None,
    ):
        self._study = study
        self._space = space
        self._evaluate = evaluate
        self._budget = budget
        self._compiler = compiler or CompileInPlace()
        self._lookahead = lookahead
        self._report = report
        self._interruption = interruption or Interruption()
        self._in_flight: deque[Proposal] = deque()
        self._free_in_a_row = 0
        self._untried = space.shuffled(study.seed)
        self._exhausted = False
        self._records: list[Record] = []
        self._known: dict[KernelConfig, Outcome] = {}
        self._elsewhere: list[KernelConfig] = []

    @property
    def records(self) -> list[Record]:
        """All finished trials, those of a resumed study included."""
        return self._study.records()

    def run(self, enqueue: Iterable[KernelConfig] = ()) -> Decision | None:
        """Search until the budget is spent, then decide; None if no configuration is correct.

        Arguments and errors are those of :meth:`explore`.
        """
        self.explore(enqueue)
        return self._decide()

    def explore(self, enqueue: Iterable[KernelConfig] = ()) -> None:
        """Search until the budget is spent, alone or together with other processes that share the study.

        Args:
            enqueue: tried right after the heuristic defaults, and before the first random ones, when the study is new;
                each as near as the space comes to it.

        Raises:
            DeviceLost, KeyboardInterrupt: finished trials are recorded, those in flight are failed.
        """
        with self._study.present():
            self._study.fail_stale()
            if self._study.is_new:
                at_random = itertools.islice(self._untried, STARTUP_TRIALS)
                near = filter(None, map(self._space.nearest, enqueue))
                self._study.enqueue(dict.fromkeys([*self._space.openings(), *near, *at_random]))
            elif (decision := self._study.decision()) and decision.trials >= self._budget.trials:
                return  # nothing is left to do
            try:
                self._loop()
            finally:
                self._study.fail_stale()  # whatever this process leaves in flight

    def _loop(self) -> None:
        while True:
            self._fill()
            if self._out_of_time():
                return
            if not self._in_flight:
                if not self._others_hold_the_rest():
                    return
                with self._interruption.prompt():
                    time.sleep(_POLL_S)
                continue
            proposal = self._in_flight[0]
            try:
                with self._interruption.prompt():
                    outcome = self._compiler.result(proposal.config)
                if outcome is None:
                    self._study.start(proposal)
                    with self._interruption.prompt():
                        outcome = self._evaluate(proposal.config)
            except DeviceLost as error:
                # Recorded, so that a resumed search does not try it again.
                self._finish(proposal, Outcome(Kind.RUNTIME, str(error)))
                raise
            self._finish(proposal, outcome)
            self._in_flight.popleft()

    def _fill(self) -> None:
        self._refresh()
        while len(self._in_flight) < self._lookahead and self._wanted() and not self._out_of_time():
            self._interruption.check()
            if self._free_in_a_row >= _PATIENCE:
                self._enqueue_untried()
                if self._exhausted:
                    return
            proposal = self._study.ask(self._is_worth_trying)
            config = proposal.config
            if (known := self._known.get(config)) is not None:
                self._finish(proposal, known, free=True)
            elif reason := self._space.infeasible(config):
                self._finish(proposal, Outcome(Kind.RESOURCES, reason), free=True)
            elif any(config == other.config for other in self._in_flight) or not self._study.claim(proposal):
                self._free_in_a_row += 1
                self._study.abandon(proposal)
            else:
                self._free_in_a_row = 0
                self._in_flight.append(proposal)
                self._compiler.submit(config)

    def _refresh(self) -> None:
        """Read the records anew: another process may share the study, and with it the budget of trials."""
        if self._study.fail_lost():
            self._free_in_a_row, self._exhausted = 0, False
        self._elsewhere = self._study.elsewhere()
        self._records = self._study.records()
        self._known = {record.config: record.outcome for record in self._records}

    def _finish(self, proposal: Proposal, outcome: Outcome, *, free: bool = False) -> None:
        record = self._study.tell(proposal, outcome, free=free)
        self._free_in_a_row += free
        if record is None:
            return
        self._known[record.config] = outcome
        self._records.append(record)
        self._report(record)

    def _enqueue_untried(self) -> None:
        taken = {*self._known, *self._elsewhere, *(proposal.config for proposal in self._in_flight)}
        config = next((config for config in self._untried if config not in taken), None)
        self._exhausted = config is None
        if config is not None:
            self._study.enqueue([config])

    def _is_worth_trying(self, config: KernelConfig) -> bool:
        """Whether it is feasible, and neither known nor about to be."""
        if config in self._known or config in self._elsewhere or any(config == p.config for p in self._in_flight):
            return False
        return self._space.infeasible(config) is None

    def _wanted(self) -> bool:
        taken = len(self._in_flight) + len(self._elsewhere)
        return evaluated(self._records) + taken < self._budget.trials and not self._exhausted

    def _others_hold_the_rest(self) -> bool:
        """Whether to wait for other processes: one that dies leaves work behind."""
        return bool(self._elsewhere) and evaluated(self._records) < self._budget.trials

    def _out_of_time(self) -> bool:
        """Whether the budget of time is spent; the default is evaluated in any case."""
        return time.monotonic() > self._budget.deadline and bool(self._records)

    def _decide(self) -> Decision | None:
        self._refresh()
        if (earlier := self._study.decision()) and earlier.trials == evaluated(self._records):
            return earlier
        best = ranked(self._records)[: self._budget.finalists]
        if not best:
            return None
        default = self._space.default()
        outcome = self._known.get(default)
        measured = outcome is not None and outcome.ok
        streamed = self._fastest_streaming()
        finalists = [r.config for r in best] + ([default] if measured else []) + ([streamed] if streamed else [])
        finalists = list(dict.fromkeys(finalists))
        with self._interruption.prompt():
            timings = dict(zip(finalists, self._evaluate.retime(finalists)))
            winner = min(finalists, key=lambda config: timings[config].median_ms)
            verified = self._evaluate.verify(winner) or self._known[winner]
            streaming = None
            if streamed and streamed.schedule != winner.schedule:
                streaming = Streaming(streamed, timings[streamed].median_ms, self._evaluate.iterations(streamed))
        if not verified.ok:
            self._study.refute(winner, verified)
            return self._decide()
        decision = Decision(
            winner,
            retimed(verified, timings[winner]),
            timings[default].median_ms if measured else None,
            evaluated(self._records),
            datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            streaming,
        )
        self._study.decide(decision)
        return decision

    def _fastest_streaming(self) -> KernelConfig | None:
        """Of decoding's configurations that iterate over the cache: what calls with few iterations may prefer."""
        if self._space.spec.phase != "decode" or not self._space.spec.solves:
            return None
        streaming = (r.config for r in ranked(self._records) if r.config.schedule in STREAMING_SCHEDULES)
        return next(streaming, None)


def ranked(records: Iterable[Record]) -> list[Record]:
    """The correct configurations, fastest first, each once."""
    correct = sorted((r for r in records if r.outcome.ok and not r.free), key=lambda r: r.outcome.median_ms)
    return list({record.config: record for record in correct}.values())


def evaluated(records: Iterable[Record]) -> int:
    """Configurations that cost a trial."""
    return sum(not record.free for record in records)


def failures(records: Iterable[Record]) -> dict[str, int]:
    """Distinct configurations that failed, by kind; every kind is listed."""
    failed = {record.config: record.outcome.kind for record in records if not record.outcome.ok}
    return {kind.value: sum(k is kind for k in failed.values()) for kind in FAILURES}
