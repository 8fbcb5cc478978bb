"""``lla-compile doctor``: what it finds, and when it calls something broken."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tune_landscape import Landscape
from tuned import KEY, make_entry

from lla_compile import backends, doctor, self_test, tune
from lla_compile.backends import CompileError
from lla_compile.cli import main
from lla_compile.devices import identify_properties, resolve
from lla_compile.tuner import evaluate
from lla_compile.tuner.presets import PRESETS
from lla_compile.tuning_db import record, store

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    """An empty overlay and an empty shipped database."""
    monkeypatch.setenv("LLA_COMPILE_TUNING_DB", str(tmp_path / "overlay"))
    monkeypatch.setattr(store, "shipped_dir", lambda: tmp_path / "shipped")
    monkeypatch.setattr(doctor, "shipped_dir", lambda: tmp_path / "shipped")
    store.clear_cache()
    yield
    store.clear_cache()


@pytest.fixture
def landscape(monkeypatch):
    fake = Landscape()
    fake.unsupported = lambda spec, device: None if spec.phase == "forward" else "it has no such phase"
    monkeypatch.setattr(backends, "get", lambda name: fake)
    timer = SimpleNamespace(once=lambda launch: launch() and 1.0)
    monkeypatch.setattr(evaluate, "timer_for", lambda device, info: timer)
    return fake


def test_a_sound_machine(capsys):
    """The eager backend itself."""
    assert main(["doctor", "--gpu", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "result    nothing is broken" in out and "tuned     0 of the" in out
    for phase in ("forward", "backward", "decode"):
        (line,) = [line for line in out.splitlines() if f"eager   {phase}" in line]
        error, limit = (float(line.split(f"{name} ")[1].split(",")[0]) for name in ("error", "limit"))
        assert 0 < error <= limit
    assert f"torch {torch.__version__}" in out and "optuna" in out


def test_json(landscape, capsys):
    assert main(["doctor", "--gpu", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"]["id"] == "cpu" and found["broken"] == []
    assert found["backends"]["usable"] == ["eager"] and "triton" in found["backends"]["not_usable"]
    assert {check["status"] for check in found["self_test"]} == {"ok"}
    assert set(found["versions"]) >= {"torch", "triton", "cupy", "optuna", "driver", "cuda"}


def test_a_wrong_backend_is_broken(landscape, capsys):
    landscape._correct = lambda config: False
    assert main(["doctor", "--gpu", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "eager   forward   broken: error 1.0e-02, limit 1.0e-05" in out
    assert "broken    eager forward: out has error 1.0e-02" in out


def test_a_backend_that_raises_is_broken(landscape):
    config = landscape.default_config(None, None)
    landscape._failures = {config: RuntimeError("no kernel image is available")}
    checks = self_test.self_test(resolve("cpu"), CPU, {"eager": landscape}, 10.0)
    assert {(check.status, check.message) for check in checks if check.phase == "forward"} == {
        ("broken", "RuntimeError: no kernel image is available")
    }


def test_the_time_of_the_self_test_is_limited_and_running_out_is_not_broken(landscape):
    landscape._time = lambda config: time.sleep(30)
    begin = time.monotonic()
    checks = self_test.self_test(resolve("cpu"), CPU, {"eager": landscape}, 0.5)
    assert time.monotonic() - begin < 5
    assert [check.status for check in checks] == ["no time"]


def test_a_compiler_that_time_interrupts_says_no_more_than_that(landscape):
    class Slow:
        def __call__(self, config):
            try:
                time.sleep(30)
            except TimeoutError as error:
                raise CompileError("it did not compile: ^") from error

    landscape._time = Slow()
    (check,) = self_test.self_test(resolve("cpu"), CPU, {"eager": landscape}, 0.5)
    assert (check.status, check.message) == ("no time", "not finished within the time of the self-test")


def test_a_file_that_cannot_be_used_is_broken(landscape, tmp_path, capsys):
    (tmp_path / "overlay").mkdir()
    (tmp_path / "overlay" / "cpu.yaml").write_text("recipes: [soup]\n")
    assert main(["doctor", "--gpu", "cpu"]) == 1
    assert "broken    cannot use" in capsys.readouterr().out


def test_a_gpu_that_pytorch_cannot_see_is_broken(landscape, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "driver", lambda: "580.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--gpu", "cpu"]) == 1
    assert "broken    there is an NVIDIA driver 580.1, but this PyTorch" in capsys.readouterr().out


def test_entries_are_counted_and_stale_ones_named(landscape, tmp_path, capsys):
    eager = dict(key=replace(KEY, dtype="float32", head_dim=64, head_dim_v=64), backend="eager", kernel_hash="old")
    fresh = landscape.source_hash(None, None)
    shipped = [make_entry(**eager | {"seqlen": seqlen, "kernel_hash": fresh}) for seqlen in (256, 1024)]
    record(resolve("cpu"), shipped, path=tmp_path / "shipped" / "cpu.yaml")
    record(resolve("cpu"), [make_entry(**eager), make_entry(**eager | {"seqlen": 2048}, provenance="predicted")])
    assert main(["doctor", "--gpu", "cpu", "--json"]) == 0
    overlay, shipped = json.loads(capsys.readouterr().out)["database"]
    assert overlay["refused"] == {"it was measured with other kernel sources": 2}
    assert [(row["provenance"], row["count"], row["used"]) for row in overlay["entries"]] == [
        ("measured", 1, False),
        ("predicted", 1, False),
    ]
    assert shipped["entries"] == [
        {"phase": "forward", "dtype": "float32", "provenance": "measured", "used": True, "count": 2}
    ]


def specs_of(commands):
    """What the commands tune, as the tuner itself reads them."""
    specs, preset = [], PRESETS["full", "gpu"]
    for command in commands:
        program, *arguments = command.split("lla_compile.tune ")
        args = tune._parser().parse_args(arguments[0].split())
        specs += tune._specs(args, preset)
    return specs


@pytest.mark.parametrize("device", ("b200", "cpu"))
@pytest.mark.parametrize("taken", (0, 1, 5))
def test_the_commands_tune_what_is_missing_and_nothing_else(monkeypatch, device, taken):
    info = resolve(device)
    common = [spec for phase in ("forward", "backward", "decode") for spec in doctor._common(phase, info)]
    tuned = common[:: max(1, len(common) // taken)] if taken else []
    monkeypatch.setattr(doctor, "_is_missing", lambda spec, info: spec not in tuned)
    (missing, total), commands = doctor._missing(info)
    found = specs_of(commands)
    assert set(found) == set(common) - set(tuned) and len(found) == missing == total - len(tuned)
    assert len(commands) == 3 or taken


def test_a_tuned_key_is_not_missing(landscape):
    info = resolve("cpu")
    assert doctor._missing(info)[0] == (2, 8)  # no tuning helps in phases that no backend has
    key = replace(KEY, dtype="float32", head_dim=64, head_dim_v=64)
    fresh = dict(key=key, backend="eager", kernel_hash=landscape.source_hash(None, None))
    record(info, [make_entry(seqlen=1024, batch_heads=4, valid=((1, 2048), (1, 8)), **fresh)])
    (left, _), (command,) = doctor._missing(info)
    assert left == 1 and "--phase forward" in command and "--seqlen 256" in command  # in the range of the other's


@pytest.mark.parametrize(
    "name, sms, text",
    [
        ("NVIDIA H200", 132, "are those of NVIDIA H200 in devices.yaml"),
        ("NVIDIA H20", 78, "no product in devices.yaml has"),
    ],
)
def test_how_a_gpu_was_identified(monkeypatch, name, sms, text):
    info = identify_properties(name, "9.0", sms, 140.0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name=name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(doctor, "identify", lambda device: info)
    found = doctor._device(info, torch.device("cuda", 0))
    assert text in found["identified_by"] and f"{sms} SMs" in found["identified_by"] and name in found["identified_by"]
    assert found["all_gpus"] == [info.id, info.id]


def test_a_backend_that_does_not_import_is_named(monkeypatch):
    def get(name):
        if name == "eager":
            return Landscape()
        raise ImportError("no module named triton")

    monkeypatch.setattr(backends, "get", get)
    usable, refused = doctor._backends(resolve("h200"))
    why = "it does not import: no module named triton"
    assert list(usable) == ["eager"] and refused == {"triton": why, "cuda": why}


def test_an_unknown_device_is_a_usage_error(capsys):
    assert main(["doctor", "--gpu", "h20O"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "h200" in captured.err and not captured.out
