"""The command line, end to end on the CPU with the eager backend."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import optuna
import pytest
import torch
from tune_landscape import Landscape, LandscapeTimer

from lla_compile import backends, tune
from lla_compile.devices import identify, resolve
from lla_compile.key import bucket_of_spec, key_of
from lla_compile.plans import Source
from lla_compile.spec import LLASpec
from lla_compile.tuner import evaluate, storage
from lla_compile.tuning_db import lookup, read, store

TINY = "--head-dim 8 --seqlen 32 --batch-heads 1 --seed 3".split()
TINY_SPEC = LLASpec("float32", 8, 8, batch=1, num_heads=1, num_kv_heads=1, seqlen_q=32, seqlen_k=32)


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    """The user's overlay and state are left alone."""
    monkeypatch.setenv("LLA_COMPILE_TUNING_DB", str(tmp_path / "overlay"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    store.clear_cache()
    yield
    store.clear_cache()


@pytest.fixture
def landscape(monkeypatch):
    """A synthetic backend in the place of the eager one, and its clock."""
    fake = Landscape()
    monkeypatch.setattr(backends, "get", lambda name: fake)
    monkeypatch.setattr(evaluate, "timer_for", lambda device, info: LandscapeTimer(fake))
    return fake


def run(*args: str) -> int:
    return tune.main([*TINY, *args])


def states(url: str) -> list[str]:
    database = storage.open_storage(url)
    return [t.state.name for name in optuna.get_all_study_names(database)
            for t in optuna.load_study(study_name=name, storage=database, sampler=None).trials]  # fmt: skip


def refusal(capsys, *args: str) -> str:
    """The single line that a refused command leaves on stderr."""
    assert run(*args) == tune.EXIT_USAGE
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err and not captured.out
    return captured.err


def test_tune_writes_an_entry_that_lookup_finds(tmp_path, capsys):
    assert run("--trials", "3", "--gpu", "auto") == tune.EXIT_OK
    path = tmp_path / "overlay" / f"{identify('cpu').id}.yaml"
    document = read(path)
    assert store.schema_problems(document.to_dict()) == []
    (entry,) = document.entries
    assert entry.key == key_of(TINY_SPEC) and entry.tuned == bucket_of_spec(TINY_SPEC)
    assert entry.search["trials"] == 3 and entry.search["seed"] == 3
    assert set(entry.search["failed"]) == {"compile", "resources", "wrong", "timeout", "runtime"}
    backend = backends.get(entry.config.backend)
    assert entry.search["kernel_hash"] == backend.source_hash(TINY_SPEC, entry.config)
    assert entry.result["error"] <= entry.result["error_limit"]
    assert 0 < entry.result["median_ms"] <= entry.result["default_ms"]
    assert entry.toolchain == {"torch": torch.__version__}
    match = lookup(
        key_of(TINY_SPEC), bucket_of_spec(TINY_SPEC), seqlen=32, batch_heads=1, device=identify("cpu"),
        reject=lambda config, entry: None,
    )  # fmt: skip
    assert match.source is Source.EXACT and match.entry.config == entry.config
    out = capsys.readouterr().out
    assert "1 of 1 written to" in out and str(path) in out and "over default" in out


def test_quick_needs_no_other_option(tmp_path, landscape):
    assert tune.main(["--quick", "--out", str(tmp_path / "db")]) == tune.EXIT_OK
    (entry,) = read(tmp_path / "db" / "cpu.yaml").entries
    assert entry.key.dtype == "float32"


def test_several_values_are_a_grid(tmp_path, landscape):
    sizes = ["--seqlen", "48", "96", "--precision", "fast", "accurate", "--trials", "2", "--no-causal"]
    assert run(*sizes, "--out", str(tmp_path / "cpu.yaml")) == tune.EXIT_OK
    entries = read(tmp_path / "cpu.yaml").entries
    assert {(e.tuned.seqlen, e.key.precision, e.key.causal) for e in entries} == {
        (64, "fast", False), (64, "accurate", False), (128, "fast", False), (128, "accurate", False),
    }  # fmt: skip


def test_resuming_a_finished_run_measures_nothing_and_ends_the_same(tmp_path, landscape):
    url = f"sqlite:///{tmp_path}/s.sqlite3"
    arguments = ("--storage", url, "--trials", "6", "--out", str(tmp_path / "cpu.yaml"))
    assert run(*arguments) == tune.EXIT_OK
    first, before = (tmp_path / "cpu.yaml").read_text(), states(url)
    landscape.checks.clear()
    assert run(*arguments, "--resume") == tune.EXIT_OK
    assert (tmp_path / "cpu.yaml").read_text() == first and states(url) == before
    assert not landscape.checks


def test_a_key_without_a_correct_plan_is_not_written(tmp_path, monkeypatch, capsys):
    fake = Landscape(correct=lambda config: False)
    monkeypatch.setattr(backends, "get", lambda name: fake)
    assert run("--trials", "2", "--out", str(tmp_path / "cpu.yaml")) == tune.EXIT_FAILED
    assert not (tmp_path / "cpu.yaml").exists()
    assert "no configuration is correct" in capsys.readouterr().out


def test_one_impossible_key_does_not_stop_the_others(tmp_path, landscape, capsys):
    landscape.unsupported = lambda spec, device: "too long for it" if spec.seqlen_k == 64 else None
    code = run("--seqlen", "64", "32", "--trials", "2", "--out", str(tmp_path / "cpu.yaml"))
    assert code == tune.EXIT_FAILED
    assert [e.tuned.seqlen for e in read(tmp_path / "cpu.yaml").entries] == [32]
    assert "too long for it" in capsys.readouterr().out


def test_an_alias_of_two_products_means_the_one_in_the_machine(monkeypatch):
    large = resolve("nvidia-a100-80gb")
    monkeypatch.setattr(tune.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(tune, "identify", lambda device: large if device.type == "cuda" else resolve("cpu"))
    assert tune.find_device("a100") == (large, torch.device("cuda", 0))



def test_a_gpu_that_is_here_is_found_by_any_of_its_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(tune, "identify", lambda device: resolve("h200" if device.type == "cuda" else "cpu"))
    for name in ("auto", "h200", "nvidia-h200"):
        assert tune.find_device(name) == (resolve("h200"), torch.device("cuda", 0))
    assert tune.find_device("cpu") == (resolve("cpu"), torch.device("cpu"))
    assert tune.find_device("l4") == (resolve("l4"), None)


def test_an_unknown_gpu_is_refused_with_the_nearest_names(capsys):
    message = refusal(capsys, "--gpu", "h20O")
    assert "h20O" in message and "h200" in message


@pytest.mark.parametrize(
    ("url", "hint"),
    (
        ("postgresql://user:secret@127.0.0.1:1/tuning", "does not answer"),
        ("redis://127.0.0.1:1", "does not answer"),
        ("sqlite:////no/such/folder/s.sqlite3", "cannot be opened"),
        ("studies.sqlite3", "must be a URL"),
        ("journal:///no/such/folder/studies.log", "cannot be opened: /no/such/folder is not a directory"),
        ("nosuch://", "cannot be opened"),
    ),
)
def test_an_unreachable_storage_is_refused_and_nothing_is_written(tmp_path, capsys, url, hint):
    message = refusal(capsys, "--storage", url)
    assert hint in message and "secret" not in message
    assert not list(tmp_path.rglob("*"))


def test_a_file_that_is_no_database_is_refused_before_tuning_and_kept(tmp_path, capsys):
    path = tmp_path / "cpu.yaml"
    path.write_text("recipes: [soup]\n")
    assert str(path) in refusal(capsys, "--out", str(path))
    assert path.read_text() == "recipes: [soup]\n" and [p.name for p in tmp_path.iterdir()] == ["cpu.yaml"]


def test_an_impossible_place_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refusal(capsys, "--out", str(tmp_path / "file" / "cpu.yaml"))


def test_a_wrong_number_is_refused(capsys):
    assert "head_dim must be" in refusal(capsys, "--head-dim", "257")
    with pytest.raises(SystemExit) as ended:
        run("--trials", "0")
    assert ended.value.code == tune.EXIT_USAGE and "must be a positive integer, got '0'" in capsys.readouterr().err


def test_importing_the_package_imports_no_tuner():
    code = "import sys, lla_compile; assert not [m for m in sys.modules if 'tune' in m or m == 'optuna'], sys.modules"
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", code.replace("'tune' in m", "m.startswith('lla_compile.tune')")],
                   check=True, env=environment)  # fmt: skip


@contextmanager
def running(*args: str, trials: int):
    """A tuning process that has finished ``trials`` trials and goes on."""
    command = [sys.executable, "-m", "lla_compile.tune", *TINY, "--trials", "200", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        for line in child.stdout:
            if line.strip().startswith(f"{trials}/"):
                break
        try:
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
def test_a_stopped_run_keeps_its_trials_and_resumes(tmp_path, number):
    url, path = f"sqlite:///{tmp_path}/s.sqlite3", Path(tmp_path / "cpu.yaml")
    arguments = ("--storage", url, "--out", str(path))
    with running(*arguments, trials=3) as child:
        child.send_signal(number)
        out, errors = child.communicate(timeout=60)
    finished = [state for state in states(url) if state in ("COMPLETE", "PRUNED")]
    assert len(finished) >= 3 and not path.exists()
    if number == signal.SIGKILL:
        assert states(url).count("RUNNING") <= 1
    else:
        assert child.returncode == tune.EXIT_INTERRUPTED and "Traceback" not in errors
        assert "RUNNING" not in states(url)
        assert "interrupted" in out and "--resume" in out and "eager" in out
    assert run(*arguments, "--resume", "--trials", str(len(finished) + 2)) == tune.EXIT_OK
    assert "RUNNING" not in states(url) and states(url)[: len(finished)] == finished
    (entry,) = read(path).entries
    assert entry.search["trials"] >= len(finished)
