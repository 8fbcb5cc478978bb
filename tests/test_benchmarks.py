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

from benchmarks import (  # noqa: E402
    accuracy,
    backends,
    backward_sweeps,
    comparison,
    decode,
    forward,
    gradients,
    launches,
    memory,
    overhead,
    peers,
    problems,
    solver,
    sweeps,
    table,
    training,
    varlen,
)
from benchmarks import all as driver  # noqa: E402
from benchmarks.report import Benchmark, Target, write_json  # noqa: E402
from benchmarks.timing import time_all  # noqa: E402
from lla_compile import lla_attention, plan  # noqa: E402

CPU = ["--device", "cpu", "--quick"]


def run(benchmark, out, *arguments):
    assert benchmark.main([*CPU, "--out", str(out), *arguments]) == 0
    return json.loads((out / "cpu" / f"{benchmark.name}.json").read_text())


def no_peers(monkeypatch):
    monkeypatch.setattr(peers, "available", lambda package: False)


@pytest.fixture
def tiny(monkeypatch):
    """One ridge less and one precision: the paths are the same."""
    monkeypatch.setattr(comparison, "RIDGES", (10.0, 1.0))
    monkeypatch.setattr(comparison, "PRECISIONS", ("accurate",))
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
    q, k, v, grad_out = torch.randn(4, 1, 4, 8, 16)
    seen = []

    def attention(q, k, v, r=None, **options):
        seen.append((q.shape, options))
        return q * k + v

    monkeypatch.setattr(peers, "_member", lambda module, name: attention)
    for peer, shape in ((peers.flashlla(0.1, 32, q.device), (4, 8, 16)), (peers.parallax(q), (1, 8, 4, 16))):
        seen.clear()
        assert torch.equal(launches.forward(peer, (q, k, v))(), q * k + v)
        dq, dk, dv = launches.training(peer, (q, k, v), grad_out)()
        assert torch.equal(dq, grad_out * k) and torch.equal(dk, grad_out * q) and torch.equal(dv, grad_out)
        assert {x for x, _ in seen} == {shape}
        ridge = seen[0][1].get("ridge_lambda")
        assert ridge is None or (ridge.dtype == torch.float32 and ridge.item() == pytest.approx(0.1))


def test_training(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "RIDGES", (1.0, 0.1))
    monkeypatch.setattr(comparison, "PRECISIONS", ("accurate",))
    monkeypatch.setattr(training, "FLASHLLA_RIDGES", (1.0,))
    monkeypatch.setattr(training, "REFERENCE_ROWS", 40)  # of 64: the first rows of a longer problem
    monkeypatch.setattr(peers, "available", lambda package: True)
    monkeypatch.setattr(peers, "flashlla", lambda ridge, iterations, device: launches.lla(ridge, "accurate"))
    softmax, *rows, peer = run(training.BENCHMARK, tmp_path)["rows"]
    assert softmax["op"] == "sdpa" and softmax["time_over_sdpa"] == 1 and "error_dq" not in softmax
    assert peer["op"] == "flashlla" and peer["error_dk"] < 1e-5 and "error_dscale" not in peer
    assert [row["ridge"] for row in rows] == [1.0, 0.1]
    for row in rows:
        assert "failure" not in row
        assert all(row[f"error_{name}"] < 1e-4 for name in ("dq", "dk", "dv", "dridge", "dscale"))
        assert 1 <= row["adjoint_iterations_mean"] <= row["adjoint_iterations_max"]
        assert row["time_over_sdpa"] == pytest.approx(row["training_ms"] / softmax["training_ms"], rel=1e-3)
    assert rows[0]["flashlla_over_this"] == pytest.approx(peer["training_ms"] / rows[0]["training_ms"], rel=1e-3)
    assert "flashlla_over_this" not in rows[1]


def test_gradients(tmp_path, monkeypatch):
    monkeypatch.setattr(gradients, "DTYPES", ("float16",))
    for row in run(gradients.BENCHMARK, tmp_path)["rows"]:
        limit = 5e-3 if row["precision"] == "accurate" else 5e-2
        names = ("dq", "dk", "dv", "dridge", "dscale_rows")
        assert all(row[f"error_{name}"] < limit for name in names), row
        assert row["iterations_mean"] >= 1 and row["adjoint_residual_max"] < 1e-2


def test_error_of_a_cancelling_sum_is_held_against_its_terms():
    terms = torch.tensor([[[3.0, -4.0, 1.1]]])
    row = problems.gradient_errors([terms] * 5, [terms.double()] * 4 + [torch.tensor(0.0, dtype=torch.float64)])
    assert row["error_dq"] == row["error_dridge"] == 0
    assert row["error_dscale_rows"] == pytest.approx(0.1 / terms.norm().item(), rel=1e-5)


def test_varlen(tmp_path):
    lengths = varlen.random_lengths(1000, 8)
    assert sum(lengths) == 1000 and len(lengths) == 8 and min(lengths) > 0
    dense = varlen.dense_of(varlen.Batch((100, 320), 2, 16))
    assert dense.lengths == (256, 256) and dense.visible_pairs == 2 * 2 * 256 * 257 // 2
    (row,) = run(varlen.BENCHMARK, tmp_path)["rows"]
    assert "failure" not in row and row["difference"] < 1e-5
    per_pair = row["training_ms"] / row["visible_pairs"]
    dense_per_pair = row["dense_training_ms"] / row["dense_visible_pairs"]
    assert row["training_over_dense"] == pytest.approx(per_pair / dense_per_pair, rel=1e-3)


def test_decode(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(decode, "ERROR_DTYPES", ("float16",))
    rows = run(decode.BENCHMARK, tmp_path)["rows"]
    timed = [row for row in rows if row["part"] == "time"]
    assert [(row["group"], row["op"], row["precision"]) for row in timed] == [
        (group, *op) for group in (1, 2) for op in (("sdpa", None), ("lla_decode", "fast"), ("lla_decode", "accurate"))
    ]
    for softmax, *own in (timed[:3], timed[3:]):
        assert softmax["cache_bytes"] == 4 // softmax["group"] * 64 * 2 * 16 * 4
        assert softmax["gb_per_s"] == pytest.approx(softmax["cache_bytes"] / softmax["median_ms"] / 1e6, rel=1e-3)
        for row in own:
            assert "failure" not in row and row["plan"]["schedule"] == "gram" and row["plan_source"]
            assert row["time_over_sdpa"] == pytest.approx(row["median_ms"] / softmax["median_ms"], rel=1e-3)
    errors = rows[len(timed) :]
    assert [(row["precision"], row["ridge"]) for row in errors] == [
        (precision, ridge) for precision in ("fast", "accurate") for ridge in decode.ERROR_RIDGES
    ]
    for row in errors:
        assert 0 < row["error"] <= row["error_limit"]
        assert list(row["errors"]) == ["1", "7", "64"] and list(row["errors"]["7"]) == ["1", "2", "7", "33", "64"]
        assert row["error"] == row["errors"][str(row["worst_splits"])][str(row["worst_keys"])]
    capsys.readouterr()
    assert table.main(["cpu", "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| 64 | 16 | 4 | 2 | - |" in printed and "lengths from 1 to 64 keys" in printed
    assert printed.count("| float16 | 16 |") == 3 and "graph" not in printed
    with pytest.raises(ValueError, match="--graph needs a GPU"):
        decode.BENCHMARK.main([*CPU, "--out", str(tmp_path), "--graph"])


def test_decode_table_has_graph_replays_and_failures():
    shape = {"part": "time", "seqlen": 64, "head_dim": 16, "batch_heads": 2, "group": 1, "floor_ms": 0.01}
    softmax = shape | {"precision": None, "median_ms": 0.02, "graph_ms": 0.015}
    fast = shape | {"precision": "fast", "median_ms": 0.04, "graph_ms": 0.03}
    fast |= {"time_over_sdpa": 2.0, "graph_over_sdpa": 2.5}
    rows = [softmax, fast, shape | {"precision": "accurate", "failure": "broke"}]
    case = {"part": "error", "dtype": "float16", "head_dim": 16, "ridge": 1.0, "errors": {}}
    rows.append(case | {"precision": "fast", "failure": "broke"})
    rows.append(case | {"precision": "accurate", "error": 1e-3, "errors": {"1": {"7": 1e-3}}})
    text = table._decode(rows)
    assert "| floor | softmax (SDPA) | softmax (SDPA), graph | `fast` | `fast`, graph | `accurate` |" in text
    assert "| 0.01 | 0.02 | 0.015 | 0.04 (2) | 0.03 (2.5) | fails | fails |" in text
    assert "| float16 | 16 | 1.0 | fails | 1.0e-03 |" in text and "1 to 7 keys" in text


def test_decode_errors_that_are_not_finite_are_the_worst_and_others_are_recorded(monkeypatch):
    target = Target.of("cpu")
    (case, *_) = decode._error_cases((1, 5), (8,), target)
    plans = decode._plans(case.spec, target)

    class Broken:
        def bind(self, plan):
            out = case.reference(1.0)["out"].clone()
            out[0] *= math.nan if plan.config.num_splits == 7 else 1.5
            return lambda inputs, wanted: {"out": out}

    monkeypatch.setattr(decode.backends, "get", lambda name: Broken())
    row = decode._errors(case, plans, 1.0)
    assert math.isnan(row["error"]) and (row["worst_keys"], row["worst_splits"]) == (1, 7)
    assert row["errors"][1] == {1: pytest.approx(0.5), 5: 0.0}
    monkeypatch.setattr(decode.backends, "get", lambda name: None)
    assert "AttributeError" in decode._errors(case, plans, 1.0)["failure"]


def test_simulated_solver_counts_what_the_eager_backend_counts():
    system = solver.System.random(96, 16, 1.0, 0.1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = torch.randn((4, 1, 1, 96, 16), generator=generator, dtype=torch.float64)
    q = q.requires_grad_()
    out, info = lla_attention(q, k, v, 0.1, cg_tol=1e-3, return_info=True)
    out.backward(g)
    counts = list(solver.TOLERANCES).index("1e-3")
    assert torch.equal(solver.count(system.matrix, system.delta)[counts], info.iterations[0, 0])
    assert torch.equal(solver.count(system.matrix, system.t)[counts], info.adjoint.iterations[0, 0])


def test_simulated_solver_starts_and_preconditioners():
    system = solver.System.random(96, 16, 100.0, 0.1, torch.device("cpu"))
    # The exact solution as a start and the exact matrix as a preconditioner leave nothing, or one step, to do.
    assert solver.count(system.matrix, system.delta, start=system.probe).max() == 0
    assert solver.count(system.matrix, system.delta, preconditioner=system.matrix).max() == 1
    residual = system.t - (system.matrix @ system.projected_probe()[:, :, None])[:, :, 0]
    assert (residual * system.probe).sum(-1).abs().max() < 1e-9
    assert torch.allclose(system.tile_mean()[:64], system.matrix[:64].mean(0).expand(64, -1, -1))


def test_solver(tmp_path):
    rows = run(solver.BENCHMARK, tmp_path)["rows"]
    assert len(rows) == 2 * 3 * len(solver.VARIANTS)
    for row in rows:
        assert "failure" not in row
        assert row["tile_1e-2.5"] <= row["tile_1e-3"] <= row["tile_1e-3.5"]
        assert max(row["tiles"]) == row["row_max"] and len(row["tiles"]) == 3
        assert list(row["by_keys"]) == ["1 to 15", "16 to 32", "33 to 64", "65 to 128", "129 to 160"]


def test_accuracy(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "DTYPES", ("float32",))
    monkeypatch.setattr(accuracy, "RIDGES", (1.0, 0.1))
    rows = run(accuracy.BENCHMARK, tmp_path)["rows"]
    assert len(rows) == 8
    for row in rows:
        assert row["error"] < (1e-5 if row["precision"] == "accurate" else 2e-2)


def test_backends(tmp_path):
    rows = run(backends.BENCHMARK, tmp_path)["rows"]
    assert [(row["op"], row["phase"], row["precision"], row["backend"]) for row in rows] == [
        (*problem, "eager") for problem in backends.PROBLEMS
    ]
    assert all(row["median_ms"] > 0 and row["plan"]["backend"] == "eager" for row in rows)


def test_backward_sweeps(tmp_path):
    rows = run(backward_sweeps.BENCHMARK, tmp_path)["rows"]
    assert {row["op"] for row in rows} == {"parallax", "softmax"}
    for row in rows:
        assert row["config"]["backend"] == "eager" and "failure" not in row
        assert all(row[f"{name}_ms"] > 0 and row[f"{name}_tflops"] > 0 for name in ("backward", "grad_q", "grad_kv"))


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
    assert [row["passes"] for row in rows] == ["forward"] * 2 + ["forward + backward"] * 2
    for short, long in (rows[:2], rows[2:]):  # twice the length
        assert 0 < short["extra_mib"] < long["extra_mib"] < 3 * short["extra_mib"]


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
    peer = shape | {"op": "flashlla", "ridge": 10.0, "precision": None, "training_ms": 7.0}
    trained = [row | {"training_ms": 3.0} for row in rows] + [peer]
    write_json(tmp_path / "x" / "training.json", {"environment": environment, "rows": trained})
    assert table.main(["x", "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "X, 2030-01-02; torch 9.9." in printed
    assert "| 64 | 16 | 2 | 0.5 | 2 / 2 / fails |  |" in printed
    assert "flashlla, λ 10 |" in printed and "| 64 | 16 | 2 | 3 | 3 / 3 / fails |  | 7 |" in printed
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    for _ in range(2):
        assert table.main(["x", "--results", str(tmp_path), "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and text.count("fails") == 2
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        table.main(["x", "--results", str(tmp_path), "--into", str(page)])
