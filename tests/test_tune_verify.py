"""``tune --verify``: entries are measured again, written with their new figures, and tuned if they are off."""

from dataclasses import replace

import pytest
from tune_landscape import Landscape, LandscapeTimer, milliseconds

from lla_compile import backends, tune
from lla_compile.devices import identify
from lla_compile.tuner import evaluate, verify
from lla_compile.tuning_db import read, record, store

TINY = "--gpu cpu --head-dim 8 --batch-heads 1".split()


class Drifting(Landscape):
    """Becomes slower by ``factor``."""

    factor = 1.0

    def __init__(self):
        super().__init__(time=self._milliseconds)

    def _milliseconds(self, config):
        return milliseconds(config) * self.factor


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("LLA_COMPILE_TUNING_DB", str(tmp_path / "overlay"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(verify, "shipped_dir", lambda: tmp_path / "shipped")
    store.clear_cache()
    yield
    store.clear_cache()


@pytest.fixture
def landscape(monkeypatch):
    fake = Drifting()
    monkeypatch.setattr(backends, "get", lambda name: fake)
    monkeypatch.setattr(evaluate, "timer_for", lambda device, info: LandscapeTimer(fake))
    return fake


@pytest.fixture
def shipped(landscape, tmp_path):
    """A shipped file with two lengths."""
    path = tmp_path / "shipped" / "cpu.yaml"
    assert tune.main([*TINY, "--seqlen", "32", "64", "--trials", "6", "--out", str(path)]) == tune.EXIT_OK
    store.clear_cache()
    return path


@pytest.fixture
def overlay(tmp_path):
    return tmp_path / "overlay" / "cpu.yaml"


def run(*arguments):
    store.clear_cache()
    return tune.main(["--verify", "--gpu", "cpu", "--trials", "8", *arguments])


def test_what_holds_is_written_with_its_new_figures_and_not_tuned(landscape, shipped, overlay, capsys):
    before = shipped.read_text()
    landscape.factor = 1.06
    assert run() == tune.EXIT_OK
    out = capsys.readouterr().out
    assert out.count("(+6.0%)") == out.count(": holds") == 2 and "Tuning" not in out
    assert shipped.read_text() == before
    for old, new in zip(read(shipped).entries, read(overlay).entries, strict=True):
        assert new.config == old.config and new.valid == old.valid
        assert new.result["median_ms"] == pytest.approx(1.06 * old.result["median_ms"], rel=1e-4)
        assert new.result["default_ms"] == pytest.approx(1.06 * old.result["default_ms"], rel=1e-4)
        assert new.search["trials"] == 6 and new.date >= old.date


@pytest.mark.parametrize("factor", (0.7, 1.3))
def test_what_is_off_is_tuned(landscape, shipped, overlay, capsys, factor):
    landscape.factor = factor
    assert run("--seqlen", "30") == tune.EXIT_OK  # in the bucket of 32
    out = capsys.readouterr().out
    assert f"({factor - 1:+.1%})" in out and "off by more than 10%" in out and "Tuning 1 key(s)" in out
    (entry,) = read(overlay).entries
    assert entry.tuned.seqlen == 32 and entry.search["trials"] == 8
    assert entry.result["median_ms"] == pytest.approx(factor * milliseconds(entry.config), rel=1e-4)


def test_the_tolerance_is_a_knob(landscape, shipped, capsys):
    landscape.factor = 1.3
    assert run("--drift", "0.5") == tune.EXIT_OK
    assert "Tuning" not in capsys.readouterr().out


def test_a_time_that_is_off_is_taken_twice(landscape, shipped, overlay, capsys, monkeypatch):
    inner, calls = evaluate.Evaluator.retime, []

    def disturbed(self, configs):
        calls.append(configs)
        factor = 2.0 if len(calls) == 1 else 1.0
        return [replace(timing, median_ms=factor * timing.median_ms) for timing in inner(self, configs)]

    monkeypatch.setattr(evaluate.Evaluator, "retime", disturbed)
    assert run() == tune.EXIT_OK
    assert len(calls) == 3 and "2 of 2 hold" in capsys.readouterr().out


def test_a_plan_that_is_wrong_now_is_not_written_and_tuned(landscape, shipped, overlay, capsys):
    (winner, _) = (entry.config for entry in read(shipped).entries)
    landscape._correct = lambda config: config != winner and config.cg_max_iters >= 32
    assert run("--seqlen", "32") == tune.EXIT_OK
    assert "wrong: out has error" in capsys.readouterr().out
    (entry,) = read(overlay).entries
    assert entry.config != winner


def test_nothing_correct_at_all_is_a_failure(landscape, shipped, overlay):
    landscape._correct = lambda config: False
    assert run() == tune.EXIT_FAILED
    assert not overlay.exists()


def test_an_interrupted_run_keeps_what_it_measured(landscape, shipped, overlay, capsys, monkeypatch):
    inner, entries = verify.measure, []

    def measure(entry, *arguments):
        entries.append(entry)
        if len(entries) == 2:
            raise KeyboardInterrupt
        return inner(entry, *arguments)

    monkeypatch.setattr(verify, "measure", measure)
    landscape.factor = 1.02
    assert run() == tune.EXIT_INTERRUPTED
    assert "Interrupted; 1 of 1 hold; 1 written" in capsys.readouterr().out
    assert [entry.slot for entry in read(overlay).entries] == [entries[0].slot]


def test_what_look_ups_refuse_is_left_out(landscape, shipped, capsys):
    stale, good = read(shipped).entries
    store.update(shipped, lambda document: replace(document, entries=()))
    record(identify("cpu"), [replace(stale, search={**stale.search, "kernel_hash": "other"}), good], path=shipped)
    assert run() == tune.EXIT_OK
    captured = capsys.readouterr()
    assert "left out: 1 of cpu: it was measured with other kernel sources" in captured.err
    assert "Verifying 1 entries" in captured.out


def test_the_overlay_goes_first_and_predictions_are_not_verified(landscape, shipped, overlay, capsys):
    first, second = read(shipped).entries
    slower = replace(first, result={**first.result, "median_ms": 2 * first.result["median_ms"]})
    record(identify("cpu"), [slower, replace(second, provenance="predicted")], path=overlay)
    assert run("--drift", "9") == tune.EXIT_OK
    captured = capsys.readouterr()
    assert "left out: 1 of cpu: it was predicted, never measured" in captured.err
    assert "(-50.0%)" in captured.out and captured.out.count(": holds") == 2  # the second one as shipped


@pytest.mark.parametrize("arguments", (["--phase", "decode"], ["--precision", "fast"], ["--no-causal"]))
def test_filters_that_leave_nothing_are_refused(landscape, shipped, capsys, arguments):
    assert run(*arguments) == tune.EXIT_USAGE
    assert "nothing measured for cpu is in use here" in capsys.readouterr().err


def test_what_is_off_is_searched_anew_even_with_resume(landscape, shipped, overlay, capsys):
    assert run("--seqlen", "32", "--drift", "0.001", "--resume") == tune.EXIT_OK  # the study of before
    landscape.factor = 1.3
    assert run("--seqlen", "32", "--resume") == tune.EXIT_OK
    assert "resumed" not in capsys.readouterr().out
    (entry,) = read(overlay).entries
    assert entry.search["trials"] == 8


def test_several_devices_are_refused(capsys):
    assert run("--devices", "all") == tune.EXIT_USAGE
    assert "choose it with --gpu" in capsys.readouterr().err
