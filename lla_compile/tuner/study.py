"""The search of one key as an Optuna study: what to try next, and the record of what was tried."""

from __future__ import annotations

import contextlib
import time
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Callable, Iterator, Sequence

import optuna
from optuna.trial import TrialState

from lla_compile.plans import KernelConfig
from lla_compile.tuner.outcome import Kind, Outcome
from lla_compile.tuner.space import SearchSpace
from lla_compile.tuner.timing import Timing
from lla_compile.tuner.workers import Workers

# Attributes of a trial, and of the study.
_CONFIG, _OUTCOME, _FREE = "config", "outcome", "free"
_HELD, _STARTED, _LOST = "held", "started", "lost"
_REFUTED, _DECISION = "refuted", "decision"

# Processes that may die while they evaluate a configuration before it is to blame: the first may have been killed.
_MAX_LOSSES = 2

# Seconds between two looks at what another process decides.
_POLL_S = 0.05

# Random configurations before TPE has enough to model.
STARTUP_TRIALS = 10

# Draws for one proposal.
_DRAWS = 10

_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)

# Raised where a finished trial is written to: its subclass UpdateFinishedTrialError is not in Optuna 4.2.
_AlreadyFinished = RuntimeError


@dataclass(frozen=True)
class Record:
    """A finished trial.

    Attributes:
        number: its number in the study.
        config: what was tried.
        outcome: what became of it.
        free: infeasible or a repetition, so that it cost nothing.
    """

    number: int
    config: KernelConfig
    outcome: Outcome
    free: bool


@dataclass(frozen=True)
class Streaming:
    """A decoding configuration whose time grows with the iterations.

    Attributes:
        config: the fastest of its kind.
        median_ms: its time in the last comparison.
        iterations: the mean of CG in it.
    """

    config: KernelConfig
    median_ms: float
    iterations: float


@dataclass(frozen=True)
class Decision:
    """How a search ended.

    Attributes:
        config: the winner; the heuristic default if nothing beats it.
        outcome: its error, and its time in the last comparison.
        default_ms: the default's time in that comparison; None if the default fails.
        trials: configurations that had been evaluated by then.
        date: when, ISO 8601 in UTC.
        streaming: in phase "decode" the best that iterates over the cache, where the winner does not.
    """

    config: KernelConfig
    outcome: Outcome
    default_ms: float | None
    trials: int
    date: str
    streaming: Streaming | None = None


@dataclass(frozen=True)
class Proposal:
    """A configuration to try, and the running trial that its outcome belongs to."""

    trial: optuna.Trial
    config: KernelConfig


class TuningStudy:
    """One study in a storage.

    Args:
        storage: where it lives.
        name: what it is called there; it is created if it does not exist.
        space: what configurations are made of.
        seed: of the proposals: the same seed and outcomes give the same sequence.
    """

    def __init__(self, storage: optuna.storages.BaseStorage, name: str, space: SearchSpace, seed: int):
        self.name = name
        self._space = space
        self.seed = seed
        self._storage = storage
        self._study = optuna.create_study(
            storage=storage, study_name=name, direction="minimize", load_if_exists=True, sampler=_sampler(seed)
        )
        self._workers = Workers(self._study)

    @property
    def is_new(self) -> bool:
        return not self._study.get_trials(deepcopy=False)

    def records(self) -> list[Record]:
        """Finished trials in order; those that were interrupted are left out."""
        return read_records(self._study)

    def refute(self, config: KernelConfig, outcome: Outcome) -> None:
        """Put the outcome of a later check into the place of that of a configuration's trial."""
        refuted = self._study.user_attrs.get(_REFUTED, [])
        self._study.set_user_attr(_REFUTED, [*refuted, [config.as_dict(), outcome.as_dict()]])

    def enqueue(self, configs: Sequence[KernelConfig]) -> None:
        """Propose these next, as far as they lie in the space."""
        for config in configs:
            if self._space.contains(config):
                self._study.enqueue_trial(self._space.parameters(config))

    def ask(self, accept: Callable[[KernelConfig], bool] = lambda config: True) -> Proposal:
        """The next proposal: what was enqueued, else one that ``accept`` takes if a few draws find any."""

        def is_accepted(drawn: dict) -> bool:
            config = self._space.config(drawn)
            return config is None or accept(config)

        # A sampler for each trial, seeded by its number, makes a resumed search go on as if never interrupted.
        number = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = _sampler(self.seed * 1_000_003 + number, is_accepted)
        trial = self._study.ask()
        self._workers.sign(trial)
        return Proposal(trial, self._space.suggest(trial))

    def claim(self, proposal: Proposal) -> bool:
        """Whether a proposal is this process's to evaluate; False if another has evaluated it or is at it.

        Of two processes that announce the same configuration, at least one sees the other's announcement. The one with
        the later trial then gives way; the one with the earlier trial waits for that, unless the later one holds the
        configuration already, not having seen it.
        """
        trial, config = proposal.trial, proposal.config.as_dict()
        try:
            trial.set_user_attr(_CONFIG, config)
            while True:
                same = [t for t in self._trials(*_FINISHED, TrialState.RUNNING) if t.user_attrs.get(_CONFIG) == config]
                rivals = [t for t in same if t.number != trial.number]
                if any(t.state in _FINISHED or t.number < trial.number or t.user_attrs.get(_HELD) for t in rivals):
                    return False
                if not rivals:
                    trial.set_user_attr(_HELD, True)
                    return True
                time.sleep(_POLL_S)
                self.fail_lost()
        except _AlreadyFinished:
            return False  # this process was taken for dead

    def start(self, proposal: Proposal) -> None:
        """Note that a proposal is now evaluated: if the process dies, it may be to blame."""
        with contextlib.suppress(_AlreadyFinished):
            proposal.trial.set_user_attr(_STARTED, True)

    def tell(self, proposal: Proposal, outcome: Outcome, *, free: bool = False) -> Record | None:
        """Finish a proposal; None if this process was taken for dead, and another one has it now.

        A failure is pruned rather than failed, since TPE learns from pruned trials alone.
        """
        trial = proposal.trial
        try:
            trial.set_user_attr(_CONFIG, proposal.config.as_dict())
            self._finish(trial.number, outcome, free)
        except _AlreadyFinished:
            return None
        return Record(trial.number, proposal.config, outcome, free)

    def abandon(self, proposal: Proposal) -> None:
        """Fail a proposal that was not evaluated: it counts for nothing."""
        self._study.tell(proposal.trial, state=TrialState.FAIL, skip_if_finished=True)

    def present(self) -> contextlib.AbstractContextManager:
        """Show other processes that this one is at work."""
        return self._workers.present()

    def elsewhere(self) -> list[KernelConfig]:
        """What other processes are evaluating."""
        running = [t for t in self._trials(TrialState.RUNNING) if not self._workers.owns(t)]
        return [_config(t) for t in running if _CONFIG in t.user_attrs]

    def fail_stale(self) -> int:
        """Fail what this process and dead ones have left running, and queue it again; returns how many."""
        own = [trial for trial in self._trials(TrialState.RUNNING) if self._workers.owns(trial)]
        for trial in own:
            self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            self._queue_again(trial)
        return len(own) + self.fail_lost()

    def fail_lost(self) -> int:
        """Fail what dead processes have left running, and queue it for another to try; returns how many."""
        running = [trial for trial in self._trials(TrialState.RUNNING) if not self._workers.owns(trial)]
        if running:
            self._workers.refresh()
        lost = [trial for trial in running if self._workers.lost(trial)]
        for trial in lost:
            # Of several processes that notice it, all but the first find the trial finished.
            with contextlib.suppress(_AlreadyFinished):
                self._give_up(trial)
        return len(lost)

    def _give_up(self, trial: optuna.trial.FrozenTrial) -> None:
        self._set_attribute(trial.number, _LOST, True)
        if trial.user_attrs.get(_STARTED) and self._losses(trial) >= _MAX_LOSSES:
            reason = f"{_MAX_LOSSES} processes died while they ran it"
            self._finish(trial.number, Outcome(Kind.RUNTIME, reason), free=False)
            return
        self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        self._queue_again(trial)

    def _losses(self, trial: optuna.trial.FrozenTrial) -> int:
        """Processes that died while they evaluated what ``trial`` is of, its own included."""
        attributes = [t.user_attrs for t in self._trials(TrialState.FAIL, TrialState.RUNNING)]
        config = trial.user_attrs[_CONFIG]
        return sum(a.get(_CONFIG) == config and _STARTED in a and _LOST in a for a in attributes)

    def _queue_again(self, trial: optuna.trial.FrozenTrial) -> None:
        if _HELD in trial.user_attrs:
            self.enqueue([_config(trial)])

    def _finish(self, number: int, outcome: Outcome, free: bool) -> None:
        self._set_attribute(number, _OUTCOME, outcome.as_dict())
        self._set_attribute(number, _FREE, free)
        if outcome.ok:
            told = self._study.tell(number, outcome.median_ms, skip_if_finished=True)
        else:
            told = self._study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)
        if told.state is TrialState.FAIL:
            raise _AlreadyFinished

    def _set_attribute(self, number: int, name: str, value) -> None:
        """Of any trial, this process's or not."""
        study = self._storage.get_study_id_from_name(self.name)
        trial = self._storage.get_trial_id_from_study_id_trial_number(study, number)
        self._storage.set_trial_user_attr(trial, name, value)

    def _trials(self, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states)

    def decide(self, decision: Decision) -> None:
        """Keep the end of the search, so that resuming it ends the same way."""
        self._study.set_user_attr(
            _DECISION,
            {
                "config": decision.config.as_dict(),
                "outcome": decision.outcome.as_dict(),
                "default_ms": decision.default_ms,
                "trials": decision.trials,
                "date": decision.date,
                "streaming": decision.streaming and asdict(decision.streaming),
            },
        )

    def decision(self) -> Decision | None:
        """The end of the search if it has been reached."""
        return read_decision(self._study)


def read_records(study: optuna.Study) -> list[Record]:
    """Finished trials in order; those that were interrupted are left out.

    Raises:
        KeyError: the study is not one of this tuner's.
    """
    records = [
        Record(t.number, _config(t), Outcome.from_dict(t.user_attrs[_OUTCOME]), t.user_attrs[_FREE])
        for t in study.get_trials(deepcopy=False, states=_FINISHED)
    ]
    kept = study.user_attrs.get(_REFUTED, ())
    refuted = {KernelConfig.from_dict(config): Outcome.from_dict(outcome) for config, outcome in kept}
    return [replace(record, outcome=refuted.get(record.config, record.outcome)) for record in records]


def read_decision(study: optuna.Study) -> Decision | None:
    """The end of a search if it has been reached."""
    kept = study.user_attrs.get(_DECISION)
    if kept is None:
        return None
    config, outcome = KernelConfig.from_dict(kept["config"]), Outcome.from_dict(kept["outcome"])
    streaming = kept.get("streaming")
    if streaming:
        streaming = Streaming(**(streaming | {"config": KernelConfig.from_dict(streaming["config"])}))
    return Decision(config, outcome, kept["default_ms"], kept["trials"], kept["date"], streaming)


def retimed(outcome: Outcome, timing: Timing) -> Outcome:
    """An outcome with the time of the last comparison."""
    return Outcome.from_dict(outcome.as_dict() | {"median_ms": timing.median_ms, "spread": timing.spread})


def study_name(storage: optuna.storages.BaseStorage, base: str, resume: bool) -> str:
    """The last run of ``base`` to resume, or a new one: no study is ever overwritten."""
    names = set(optuna.get_all_study_names(storage))
    run = 1
    while f"{base}/run{run}" in names:
        run += 1
    return f"{base}/run{run - 1 if resume and run > 1 else run}"


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Silence Optuna's lines for each trial and its notes on experimental arguments."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        # Optuna 5 announces the end of constraints_func in Optuna 7; its successor does not exist in Optuna 4.
        warnings.filterwarnings("ignore", message=".*constraints_func", category=FutureWarning)
        try:
            yield
        finally:
            optuna.logging.set_verbosity(verbosity)


class _ChoosySampler(optuna.samplers.TPESampler):
    """TPE that draws again what is not accepted: a proposal that leads to nothing costs ten times as much as a draw."""

    def __init__(self, accept: Callable[[dict], bool], **options):
        super().__init__(**options)
        self._accept = accept

    def sample_relative(self, study, trial, search_space) -> dict:
        for _ in range(_DRAWS):
            drawn = super().sample_relative(study, trial, search_space)
            if not drawn or self._accept(drawn):
                break
        return drawn


def _sampler(seed: int, accept: Callable[[dict], bool] = lambda drawn: True) -> optuna.samplers.TPESampler:
    return _ChoosySampler(
        accept,
        seed=seed % 2**32,
        n_startup_trials=STARTUP_TRIALS,
        multivariate=True,
        group=True,  # the knobs of one backend are modelled together, those of different backends apart
        constant_liar=True,  # proposals are made while earlier ones still compile
        constraints_func=_constraints,
    )


def _constraints(trial: optuna.trial.FrozenTrial) -> tuple[float, ...]:
    return (Outcome.from_dict(trial.user_attrs[_OUTCOME]).violation,)


def _config(trial: optuna.trial.FrozenTrial) -> KernelConfig:
    return KernelConfig.from_dict(trial.user_attrs[_CONFIG])
