"""The examples and the Python of the README run as they are printed."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    if path.stem == "inspect_plan":
        assert "nvidia-h200" in printed and "nvidia-a100" in printed
    else:
        errors = [float(x) for x in re.findall(r"median error (\S+),", printed)]
        # The point of the example: the smaller the ridge, the better an affine function is reproduced.
        assert len(errors) == 3 and errors[0] > errors[1] > errors[2] and errors[2] < 0.05


def test_readme_blocks_run_in_order(capsys):
    assert len(BLOCKS) == 3
    names = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert names["o"].shape == (1, 4, 256, 64) and names["o"].isfinite().all()
    assert "nvidia-a100-40gb" in printed and "iterations on average" in printed
