"""Runs the interpreted cases in processes of their own: the interpreter is chosen before Triton is first imported."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
KINDS = ("cases", "backward_cases", "decode_cases", "stream_cases", "parallax_cases")
CASES = [Path(__file__).with_name(f"interpreted_{name}.py") for name in KINDS]
NAMES = [
    f"{path.stem}.{name}" for path in CASES for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[dict[str, list[str]], str]:
    """For each test function the failures of its cases ("" for a case that passed), and the processes' output."""
    folder = tmp_path_factory.mktemp("interpreter")
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider"]
    started = {
        folder / f"{path.stem}.xml": subprocess.Popen(
            [*command, str(path), f"--junitxml={folder / path.stem}.xml"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"TRITON_INTERPRET": "1"},
        )
        for path in CASES
    }  # fmt: skip
    output = "".join(process.communicate()[0] for process in started.values())
    outcomes: dict[str, list[str]] = {}
    for report in started:
        assert report.exists(), output
        for case in ElementTree.parse(report).iter("testcase"):
            problems = [f"{case.get('name')}: {child.tag}\n{child.text}" for child in case if child.tag != "system-out"]
            module = case.get("classname").rpartition(".")[2]
            outcomes.setdefault(f"{module}.{case.get('name').partition('[')[0]}", []).append("\n".join(problems))
    return outcomes, output


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name, results):
    outcomes, output = results
    assert name in outcomes, output
    failures = [text for text in outcomes[name] if text]
    assert not failures, "\n".join(failures)
