"""The examples and the Python of the README run as they are printed."""

import importlib
import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
WITH_OPTIONS = {"cg_ablation", "memory_latency", "test_time_regression", "train_recall"}
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem not in WITH_OPTIONS]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    if path.stem == "inspect_plan":
        assert "nvidia-h200" in printed and "nvidia-a100" in printed
    elif path.stem == "decode":
        differences = re.findall(
            r"(\w+) cache: 32 steps, largest relative difference from lla_attention (\S+)", printed
        )
        assert [name for name, _ in differences] == ["dense", "paged"]
        assert all(float(x) < 1e-4 for _, x in differences)
    else:
        errors = [float(x) for x in re.findall(r"median error (\S+),", printed)]
        # The point of the example: the smaller the ridge, the better an affine function is reproduced.
        assert len(errors) == 3 and errors[0] > errors[1] > errors[2] and errors[2] < 0.05


@pytest.fixture
def load(monkeypatch):
    """Imports an example as a module, which may import another."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in WITH_OPTIONS:
        sys.modules.pop(name, None)


@pytest.fixture
def train_recall(load):
    return load("train_recall")


def is_plotted(path):
    return path.exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_recall_is_trained_and_recorded(train_recall, tmp_path, capsys):
    assert train_recall.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "recall.json").read_text())
    assert document["settings"]["pairs"] == 4 and set(document["curves"]) == {"lla", "softmax"}
    for curve in document["curves"].values():
        assert len(curve["step"]) == len(curve["loss"]) == len(curve["accuracy"]) > 10
        assert curve["loss"][-1] < curve["loss"][0] - 0.1 and not curve["interrupted"]
        assert list(curve["accuracy_by_pairs"]) == ["2", "4"]
    assert is_plotted(tmp_path / "recall.png")
    assert all(0 < ridge < 1 for ridge in document["curves"]["lla"]["ridges"])
    printed = capsys.readouterr().out
    assert "softmax  2 pairs" in printed and "chance 6.2%" in printed


def test_interrupted_recall_saves_what_there_is(train_recall, tmp_path, monkeypatch, capsys):
    evaluate, calls = train_recall.evaluate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(train_recall, "evaluate", interrupted)
    assert train_recall.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 130
    (curve,) = json.loads((tmp_path / "recall.json").read_text())["curves"].values()
    assert curve["interrupted"] and curve["step"] == [2, 4] and "accuracy_by_pairs" not in curve
    assert "interrupted" in capsys.readouterr().out


def test_recall_asks_every_key_once(train_recall):
    options = train_recall.parse(["--device", "cpu"])
    options.generator = torch.Generator().manual_seed(0)
    tokens, targets = train_recall.make_batch(5, options)
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        pairs = dict(zip(row[0:10:2], row[1:10:2]))
        asked = {token: value for token, value in zip(row, wanted) if value != train_recall.UNASKED}
        assert len(pairs) == 5 and asked == {key: value - 1 - options.vocab for key, value in pairs.items()}
    with pytest.raises(SystemExit):
        train_recall.parse(["--pairs", "30", "--seqlen", "64"])


def test_regression_at_test_time(load, tmp_path, capsys):
    example = load("test_time_regression")
    assert example.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "test_time_regression.json").read_text())
    assert document["settings"]["rank"] == 4 and set(document["segments"]) == {"16", "128"}
    short = {name: result["mse"] for name, result in document["segments"]["16"].items()}
    assert short["lla"] < min(short["softmax"], short["ridge"])  # the point of the example
    assert all(len(result["curve"]) == 32 for result in document["segments"]["128"].values())
    assert is_plotted(tmp_path / "test_time_regression.png")
    assert "mean squared errors" in capsys.readouterr().out
    for wrong in (["--segments", "60"], ["--rank", "65"], ["--sequences", "1"]):
        with pytest.raises(SystemExit):
            example.parse(wrong)


def test_recursive_least_squares_is_ridge_regression(load):
    example = load("test_time_regression")
    options = example.parse(["--quick", "--device", "cpu"])
    data = example.make_sequences(2, 16, options, seed=0)
    out = example.predict_ridge(data, 0.5)
    k, v = (x[:, :100].double() for x in (data.k, data.v))
    weights = torch.linalg.solve(k.mT @ k + 0.5 * torch.eye(options.dim, dtype=torch.float64), k.mT @ v)
    expected = data.k[:, 100, None].double() @ weights
    assert torch.allclose(out[:, 99], expected[:, 0].float(), atol=1e-5)
    assert abs(data.target.square().mean() - 1) < 0.3


def test_sequences_have_the_variance_of_the_docstring(load):
    example = load("test_time_regression")
    options = example.parse(["--quick", "--dim", "16", "--rank", "4", "--device", "cpu"])
    data = example.make_sequences(64, 64, options, seed=0)
    assert abs(data.target.square().mean() - 1) < 0.1
    assert abs((data.v - data.target).std() - 0.1) < 0.01
    spread = data.k[:, :64] - data.k[:, :64].mean(1, keepdim=True)
    assert torch.linalg.matrix_rank(spread, rtol=1e-4).eq(4).all()


def test_ablation_of_iterations(load, tmp_path, capsys):
    example = load("cg_ablation")
    argv = ["--quick", "--device", "cpu", "--steps", "6", "--iterations", "1", "10", "--out", str(tmp_path)]
    assert example.main(argv) == 0
    results = json.loads((tmp_path / "cg_ablation.json").read_text())["results"]
    runs = [(ridge, iterations) for ridge in (1.0, 0.1, "token") for iterations in (1, 10)]
    assert [(x["ridge"], x["iterations"]) for x in results] == [(None, 0), *runs]
    assert is_plotted(tmp_path / "cg_ablation.png")
    assert "ridge token, T 10" in capsys.readouterr().out


def test_iterations_reach_the_operator(load):
    example = load("cg_ablation")
    options = example.parse(["--quick", "--device", "cpu"])
    layers = [block.attention[1].attention for block in example.make_model(0.1, 3, options).blocks]
    assert [(layer.ridge.value, layer.cg_max_iters) for layer in layers] == [(0.1, 3), (0.1, 3)]


def test_memory_and_latency(load, tmp_path, capsys):
    example = load("memory_latency")
    argv = ["--lengths", "32", "64", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert example.main(argv) == 0
    results = json.loads((tmp_path / "memory_latency.json").read_text())["results"]
    for name in ("LLA", "Parallax"):
        short, long = (results[name][length]["kept_mib"] for length in ("32", "64"))
        assert 0 < long <= 2.1 * short  # linear in the length
    assert is_plotted(tmp_path / "memory_latency.png")
    assert "softmax (SDPA)" in capsys.readouterr().out


def test_readme_blocks_run_in_order(capsys):
    assert len(BLOCKS) == 8
    names = {}
    for block in BLOCKS:
        if "from transformers" in block and not importlib.util.find_spec("transformers"):
            continue
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert names["o"].shape == (1, 4, 256, 64) and names["o"].isfinite().all()
    assert names["cache"].seqlens.tolist() == [100, 100]
    assert names["logit"].grad.shape == (4, 1) and names["info"].iterations.shape == (1, 4, 256)
    assert "nvidia-a100-40gb" in printed and "iterations on average" in printed
    assert names["slots"].seqlens.tolist() == [32, 32] and names["packed"].shape == (32, 64)
    differences = re.findall(r"converted: (\S+) of (\S+)", printed)
    assert len(differences) == 2 and all(float(x) < 1e-5 * float(norm) for x, norm in differences)
    if "logits" in names:
        assert names["written"].shape == (1, 11) and names["logits"].shape == (1, 11, 64)
