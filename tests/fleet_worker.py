"""A process that takes part in a search of the synthetic landscape, and writes down what it evaluates."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from tune_landscape import SPEC, Landscape, evaluator, problem

from lla_compile.tuner.search import Budget, Search
from lla_compile.tuner.space import SearchSpace
from lla_compile.tuner.storage import open_storage
from lla_compile.tuner.study import TuningStudy, quiet_optuna

NAME = "key/run1"


def space_of(landscape: Landscape) -> SearchSpace:
    return SearchSpace.joint(SPEC, problem().device, {"eager": landscape})


def open_study(url: str, landscape: Landscape) -> TuningStudy:
    return TuningStudy(open_storage(url), NAME, space_of(landscape), seed=0)


def evaluations(log: Path) -> list[tuple[int, str]]:
    """(process, configuration) in the order in which evaluations began."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [tuple(json.loads(line)) for line in lines]


def work(url: str, log: Path, trials: int, barrier, gone: Path, pause_after: int) -> None:
    """Search until ``trials`` are done; after ``pause_after`` evaluations the next one waits for the file ``gone``."""
    landscape = Landscape()
    inner, own = evaluator(landscape), []

    class Evaluate:
        retime, verify = inner.retime, inner.verify

        def __call__(self, config):
            own.append(config)
            line = json.dumps([os.getpid(), config.describe()]) + "\n"
            with open(log, "a") as file:  # one write of one line: no other process comes between
                file.write(line)
            while len(own) > pause_after and not gone.exists():
                time.sleep(0.05)
            time.sleep(0.02)  # so that the others have their turn
            return inner(config)

    barrier.wait()
    with quiet_optuna():
        study = open_study(url, landscape)
        budget = Budget(trials, time.monotonic() + 120, finalists=2)
        decision = Search(study, space_of(landscape), Evaluate(), budget).run()
    assert decision is not None and decision.trials >= trials
