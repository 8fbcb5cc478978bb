"""Searches replayed on a recorded space: how soon they find what is best in it."""

import time
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from lla_compile.tuner.outcome import Kind
from lla_compile.tuner.replay import Recording, Replay
from lla_compile.tuner.search import Budget, Search, evaluated
from lla_compile.tuner.study import TuningStudy, quiet_optuna

SPACES = sorted((Path(__file__).parent / "data").glob("space-*.json"))


class Found(Exception):
    """A search has what is looked for: it can only end with something faster."""


def finds(recording: Recording, limit_ms: float, seed: int, trials: int) -> bool:
    """Whether so many trials come to a configuration that takes at most ``limit_ms``."""

    def stop_when_found(record):
        if record.outcome.ok and record.outcome.median_ms <= limit_ms:
            raise Found

    space = recording.space()
    study = TuningStudy(optuna.storages.InMemoryStorage(), "replay", space, seed)
    budget = Budget(trials, time.monotonic() + 600, finalists=3)
    search = Search(study, space, Replay(recording), budget, report=stop_when_found)
    try:
        search.run()
    except Found:
        return True
    assert evaluated(search.records) == trials
    return False


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_sixty_trials_come_near_the_best_wherever_they_begin(path):
    """From the slowest configuration in place of the heuristic default, which may be as good as the best."""
    recording = Recording.load(path)
    assert len(recording.outcomes) > 120
    correct = [config for config, outcome in recording.outcomes.items() if outcome.ok]
    slowest = max(correct, key=lambda config: recording.outcomes[config].median_ms)
    recording = replace(recording, default=slowest)
    with quiet_optuna():
        found = sum(finds(recording, 1.05 * recording.best_ms, seed, 60) for seed in range(20))
    assert found >= 18


def test_a_recording_crosses_its_file(tmp_path):
    recording = Recording.load(SPACES[0])
    recording.save(tmp_path / "space.json")
    assert Recording.load(tmp_path / "space.json") == recording
    assert recording.default in recording.outcomes and recording.space().contains(recording.default)


def test_what_was_not_recorded_is_infeasible():
    recording = Recording.load(SPACES[0])
    other = replace(recording.default, num_warps=32)
    assert Replay(recording)(other).kind is Kind.RESOURCES and recording.space().infeasible(other)
