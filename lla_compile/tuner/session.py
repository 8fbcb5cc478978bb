"""One key from spec to database entry."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, Sequence

import optuna

from lla_compile.key import key_of
from lla_compile.plans import KernelConfig
from lla_compile.prediction import efficiency
from lla_compile.spec import LLASpec
from lla_compile.tuner.compile_pool import CompilePool
from lla_compile.tuner.evaluate import Evaluator
from lla_compile.tuner.interruption import Interruption
from lla_compile.tuner.outcome import DeviceLost
from lla_compile.tuner.predictor import Predictor, comparable, predictable_backends
from lla_compile.tuner.presets import Preset
from lla_compile.tuner.problem import Problem
from lla_compile.tuner.search import Budget, Search, evaluated, failures, ranked
from lla_compile.tuner.space import SearchSpace, usable_backends
from lla_compile.tuner.study import Decision, Record, TuningStudy, study_name
from lla_compile.tuner.toolchain import compilers, toolchain
from lla_compile.tuner.writer import make_entry, make_predicted_entry, neighbours, write


@dataclass(frozen=True)
class Settings:
    """What holds for all keys of a command.

    Attributes:
        preset: effort.
        seed: of the proposals.
        resume: go on with the last study of the same name.
        storage: where studies live.
        path: the database file written to.
        interruption: ends a search between two records.
        backends: names of the backends searched; empty leaves it to the device.
        pool: compiles ahead of timing; None leaves compilation to the first launch.
        features: where features of compiled kernels are kept if times are predicted; None measures them.
    """

    preset: Preset
    seed: int
    resume: bool
    storage: optuna.storages.BaseStorage
    path: Path
    interruption: Interruption
    backends: tuple[str, ...] = ()
    pool: CompilePool | None = None
    features: Path | None = None


@dataclass(frozen=True)
class KeyResult:
    """What the search of one key came to.

    Attributes:
        spec: what was tuned.
        config: the winner, or the best so far of a search that did not end; None if nothing is correct.
        decision: the end of the search, if it ended with a winner.
        trials: configurations evaluated.
        failed: failures by kind.
        note: why there is no entry; "" if it was written.
    """

    spec: LLASpec
    config: KernelConfig | None = None
    decision: Decision | None = None
    trials: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    note: str = ""


class Watcher(Protocol):
    """Follows a session."""

    def begin(self, spec: LLASpec, trials: int, finished: int) -> None:
        """A search begins, with ``finished`` trials taken over from a resumed study."""

    def trial(self, record: Record) -> None:
        """A trial has ended."""

    def end(self, result: KeyResult) -> None:
        """The search has ended, one way or another."""


def tune_key(problem: Problem, settings: Settings, watcher: Watcher) -> KeyResult:
    """Search one key and write its winner.

    Raises:
        ValueError: no backend can run it.
        DatabaseError: the winner cannot be written.
        DeviceLost, KeyboardInterrupt: the search did not end; the watcher has been told the best so far.
    """
    space = _space(problem, settings)
    study = _study(problem, space, settings, settings.resume)
    search = _search(problem, space, study, settings, watcher)
    try:
        decision = search.run(neighbours(problem))
    except (DeviceLost, KeyboardInterrupt) as error:
        watcher.end(_unfinished(problem.spec, study.records(), error))
        raise
    records = study.records()
    result = KeyResult(
        problem.spec, trials=evaluated(records), failed=failures(records), note="no configuration is correct"
    )
    if decision is not None:
        make = make_entry if settings.features is None else make_predicted_entry
        write(problem, make(problem, space, decision, records, settings.seed), settings.path)
        result = replace(result, config=decision.config, decision=decision, note="")
    watcher.end(result)
    return result


def begin_key(problem: Problem, settings: Settings) -> None:
    """Make the study of a new search, for other processes to go on with.

    Raises:
        ValueError: no backend can run it.
    """
    _study(problem, _space(problem, settings), settings, resume=False)


def explore_key(problem: Problem, settings: Settings, watcher: Watcher) -> None:
    """Take part in the last search of a key; nothing is decided or written.

    Raises:
        ValueError: no backend can run it.
        DeviceLost, KeyboardInterrupt: the search did not end.
    """
    space = _space(problem, settings)
    study = _study(problem, space, settings, resume=True)
    _search(problem, space, study, settings, watcher).explore(neighbours(problem))


def _space(problem: Problem, settings: Settings) -> SearchSpace:
    predicts = settings.features is not None
    found = (predictable_backends if predicts else usable_backends)(problem.spec, problem.device, settings.backends)
    space = SearchSpace.joint(problem.spec, problem.device, found)
    return comparable(space) if predicts else space


def _study(problem: Problem, space: SearchSpace, settings: Settings, resume: bool) -> TuningStudy:
    base = _study_base(problem, space, settings.seed, settings.features is not None)
    name = study_name(settings.storage, base, resume)
    return TuningStudy(settings.storage, name, space, settings.seed)


def _search(
    problem: Problem, space: SearchSpace, study: TuningStudy, settings: Settings, watcher: Watcher
) -> Search:
    preset = settings.preset
    deadline = time.monotonic() + preset.timeout_s
    watcher.begin(problem.spec, preset.trials, evaluated(study.records()))
    if settings.features is None:
        evaluator = Evaluator(problem, space.backends, preset)
    else:
        evaluator = Predictor(problem, settings.features)
    compiler, lookahead = None, 1
    if settings.pool is not None:
        compiler, lookahead = settings.pool.compiler(evaluator.specs()), preset.lookahead
    budget = Budget(preset.trials, deadline, preset.finalists)
    return Search(study, space, evaluator, budget, compiler, lookahead, watcher.trial, settings.interruption)


def _unfinished(spec: LLASpec, records: Sequence[Record], error: BaseException) -> KeyResult:
    best = ranked(records)[:1]
    reason = "the device was lost" if isinstance(error, DeviceLost) else "interrupted"
    return KeyResult(
        spec,
        config=best[0].config if best else None,
        trials=evaluated(records),
        failed=failures(records),
        note=f"{reason}, nothing written",
    )


def _study_base(problem: Problem, space: SearchSpace, seed: int, predicted: bool) -> str:
    """What makes two searches the same one: device, key, sizes, kernels and toolchain or compilers and model, seed."""
    spec = problem.spec
    sizes = f"N{spec.seqlen_k} BH{spec.batch_heads}"
    versions = toolchain(problem.torch_device.type)
    if predicted:
        versions = compilers(space.backends) | {"model": str(efficiency.VERSION)}
    digest = space.digest(versions)
    return f"{problem.device.id}/{key_of(spec).describe()}/{sizes}/{digest}/seed{seed}"
