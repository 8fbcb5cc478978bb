"""Benchmarks in tiny form: they measure, record what fails, and write files that the table can read."""

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks is no part of the installed package

from benchmarks import accuracy, forward, memory, overhead, peers, problems, sweeps, table  # noqa: E402
from benchmarks import all as driver  # noqa: E402
from benchmarks.report import Benchmark, Target, write_json  # noqa: E402
from benchmarks.timing import time_all  # noqa: E402
from lla_compile import plan  # noqa: E402

CPU = ["--device", "cpu", "--quick"]


def run(benchmark, out, *arguments):
    assert benchmark.main([*CPU, "--out", str(out), *arguments]) == 0
    return json.loads((out / "cpu" / f"{benchmark.name}.json").read_text())


def no_peers(monkeypatch):
    monkeypatch.setattr(peers, "available", lambda package: False)


@pytest.fixture
def tiny(monkeypatch):
    """One ridge less and one precision: the paths are the same."""
    monkeypatch.setattr(forward, "RIDGES", (10.0, 1.0))
    monkeypatch.setattr(forward, "PRECISIONS", ("accurate",))
    no_peers(monkeypatch)


def test_forward(tmp_path, tiny):
    document = run(forward.BENCHMARK, tmp_path)
    assert document["environment"]["device"]["id"] == "cpu"
    assert document["environment"]["versions"]["torch"] == torch.__version__
    softmax, *rows = document["rows"]
    assert softmax["op"] == "sdpa" and softmax["median_ms"] > 0
    assert [row["ridge"] for row in rows] == [10.0, 1.0]
    for row in rows:
        assert "failure" not in row
        assert row["error"] < 1e-5
        assert row["plan"]["backend"] == "eager" and row["plan_source"]
        assert 1 <= row["iterations_mean"] <= row["iterations_max"] <= row["plan"]["cg_max_iters"]
        assert row["time_over_sdpa"] == pytest.approx(row["median_ms"] / softmax["median_ms"], rel=1e-3)


def test_forward_records_a_peer_that_fails(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(peers, "available", lambda package: True)
    monkeypatch.setattr(peers, "_member", lambda module, name: getattr(torch, "no_such_" + name))
    rows = run(forward.BENCHMARK, tmp_path)["rows"]
    failed = {row["op"] for row in rows if "AttributeError" in row.get("failure", "")}
    assert failed == {"flashlla, 32 iterations", "flashlla, 5 iterations", "fla parallax"}
    assert all(row["median_ms"] > 0 for row in rows if row["op"] in ("sdpa", "lla_attention"))


def test_peers_are_called_with_their_own_layout(monkeypatch):
    q, k, v = torch.randn(3, 1, 4, 8, 16)

    def attention(q, k, v, r=None, **options):
        return q

    monkeypatch.setattr(peers, "_member", lambda module, name: attention)
    assert peers.flashlla(q, k, v, 1.0, 32)().shape == (1, 4, 8, 16)
    assert peers.parallax(q, k, v)().shape == (1, 8, 4, 16)


def test_accuracy(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "DTYPES", ("float32",))
    monkeypatch.setattr(accuracy, "RIDGES", (1.0, 0.1))
    rows = run(accuracy.BENCHMARK, tmp_path)["rows"]
    assert len(rows) == 8
    for row in rows:
        assert row["error"] < (1e-5 if row["precision"] == "accurate" else 2e-2)


def test_sweeps(tmp_path):
    rows = run(sweeps.BENCHMARK, tmp_path)["rows"]
    assert all("failure" not in row and row["config"]["schedule"] == "split" for row in rows)
    rows = run(sweeps.BENCHMARK, tmp_path, "--config", "32,32")["rows"]
    assert "ValueError" in rows[0]["failure"]  # too few knobs


def test_memory_counts_what_lives(tmp_path):
    with memory.LiveBytes() as live:
        a = torch.zeros(1000)
        a += 1
        a.view(10, 100)
        del a
        b = torch.zeros(800)
        b = b * 2
    assert live.peak == 6400  # the last two, which never coexist with the first
    rows = run(memory.BENCHMARK, tmp_path)["rows"]
    assert rows[1]["extra_mib"] < 3 * rows[0]["extra_mib"]


def test_overhead(tmp_path):
    rows = {row["what"]: row["median_us"] for row in run(overhead.BENCHMARK, tmp_path)["rows"]}
    assert set(rows) == {"bare launch", "lla_attention", "overhead of a call", "import beyond torch"}


def test_executed_flops_follow_the_slowest_row_of_each_tile():
    shape = problems.Shape(seqlen=8, head_dim=4, batch_heads=1)
    chosen = plan(shape.spec("float32"), device="h200")
    outside, one = chosen.flops
    iterations = torch.full((1, 1, 8), 3)
    assert problems.executed_flops(chosen, iterations) == pytest.approx(outside + 3 * one)
    chosen = replace(chosen, config=replace(chosen.config, block_q=4))
    iterations[..., 1] = 7  # rows 0 to 3 see 10 of the 36 pairs
    assert problems.executed_flops(chosen, iterations) == pytest.approx(outside + one * (7 * 10 + 3 * 26) / 36)


def test_timing_goes_on_after_a_failure():
    def broken():
        raise RuntimeError("no such kernel")

    times, failures = time_all({"a": lambda: None, "b": broken}, Target.of("cpu"), quick=True)
    assert set(times) == {"a"} and failures == {"b": "RuntimeError: no such kernel"}
    assert time_all({"b": broken}, Target.of("cpu"), quick=True)[0] == {}


def test_one_benchmark_that_fails_is_recorded_and_the_others_run(tmp_path):
    def broken(options: argparse.Namespace, target: Target):
        raise RuntimeError("out of order")

    benchmarks = (
        Benchmark("bad", "", broken, ()),
        Benchmark("good", "", lambda options, target: [{"x": 1.0, "y": math.nan}], ("x", "y")),
    )
    assert driver.main([*CPU, "--out", str(tmp_path)], benchmarks) == 1
    bad, good = json.loads((tmp_path / "cpu" / "all.json").read_text())["rows"]
    assert bad["failure"] == "RuntimeError: out of order" and good["failure"] is None
    assert json.loads((tmp_path / "cpu" / "good.json").read_text())["rows"] == [{"x": 1.0, "y": "nan"}]
    assert not (tmp_path / "cpu" / "bad.json").exists()


def test_the_driver_has_them_all():
    names = {benchmark.name for benchmark in driver.BENCHMARKS}
    modules = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "BENCHMARK = " in path.read_text()}
    assert names == modules


def test_table_goes_between_the_marks(tmp_path, capsys):
    environment = {"device": {"name": "X"}, "date": "2030-01-02T03:04:05", "versions": {"torch": "9.9"}}
    shape = {"seqlen": 64, "head_dim": 16, "batch_heads": 2}
    rows = [shape | {"op": "sdpa", "ridge": None, "precision": None, "median_ms": 0.5}]
    rows += [
        shape | {"op": "lla_attention", "ridge": ridge, "precision": "fast", "median_ms": 2.0} for ridge in (10.0, 1.0)
    ]
    rows.append(rows[-1] | {"ridge": 0.1, "failure": "broke"})
    write_json(tmp_path / "x" / "forward.json", {"environment": environment, "rows": rows})
    assert table.main(["x", "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "X, 2030-01-02; torch 9.9." in printed
    assert "| 64 | 16 | 2 | 0.5 | 2 / 2 / fails |  |" in printed
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    for _ in range(2):
        assert table.main(["x", "--results", str(tmp_path), "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and text.count("fails") == 1
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        table.main(["x", "--results", str(tmp_path), "--into", str(page)])
