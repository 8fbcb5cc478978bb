"""The examples and the Python of the README run as they are printed."""

import importlib.util
import json
import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = [path for path in sorted((ROOT / "examples").glob("*.py")) if path.stem != "train_recall"]
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
def train_recall():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("train_recall", ROOT / "examples" / "train_recall.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_recall_is_trained_and_recorded(train_recall, tmp_path, capsys):
    assert train_recall.main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "recall.json").read_text())
    assert document["settings"]["pairs"] == 4 and set(document["curves"]) == {"lla", "softmax"}
    for curve in document["curves"].values():
        assert len(curve["step"]) == len(curve["loss"]) == len(curve["accuracy"]) > 10
        assert curve["loss"][-1] < curve["loss"][0] - 0.1 and not curve["interrupted"]
        assert list(curve["accuracy_by_pairs"]) == ["2", "4"]
    assert (tmp_path / "recall.png").exists() == (importlib.util.find_spec("matplotlib") is not None)
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


def test_readme_blocks_run_in_order(capsys):
    assert len(BLOCKS) == 5
    names = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert names["o"].shape == (1, 4, 256, 64) and names["o"].isfinite().all()
    assert names["cache"].seqlens.tolist() == [100, 100]
    assert names["logit"].grad.shape == (4, 1) and names["info"].iterations.shape == (1, 4, 256)
    assert "nvidia-a100-40gb" in printed and "iterations on average" in printed
