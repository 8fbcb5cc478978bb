"""``lla-compile report``: one page that needs no network, and clear errors for a wrong study."""

import re
import sqlite3
import subprocess
import sys
import time

import optuna
import pytest
from tune_landscape import BEST, SPEC, Landscape, evaluator, problem

from lla_compile.backends import CompileError
from lla_compile.cli import main
from lla_compile.tuner.search import Budget, Search, ranked
from lla_compile.tuner.space import SearchSpace
from lla_compile.tuner.storage import open_storage
from lla_compile.tuner.study import TuningStudy, quiet_optuna
from lla_compile.tuning_db.short import short

pytest.importorskip("plotly", reason="the report needs plotly: pip install 'lla-compile[report]'")


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


def search(url, name, trials, **options):
    """A finished search in ``url``; returns its records."""
    landscape = Landscape(**options)
    space = SearchSpace.joint(SPEC, problem().device, {"eager": landscape})
    with quiet_optuna():
        study = TuningStudy(open_storage(url), name, space, seed=0)
        budget = Budget(trials, time.monotonic() + 60, finalists=2)
        Search(study, space, evaluator(landscape), budget).run([BEST])
    return study.records()


def run(capsys, *arguments):
    status = main(["report", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("kind", ("sqlite", "journal"))
def test_the_page(tmp_path, capsys, kind):
    file = tmp_path / f"studies.{kind}"
    url = f"sqlite:///{file}" if kind == "sqlite" else f"journal://{file}"
    failing = Landscape().default_config(SPEC, None)
    refused = {failing: CompileError("no such <instruction>")}
    records = search(url, "cpu/key/run1", 30, failures=refused)
    assert run(capsys, file, "--out", "page.html") == (0, "page.html: cpu/key/run1\n", "")
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r'<(?:script|link|img|iframe)[^>]+(?:src|href)=', page)
    text = page[page.index("<body>") :]
    best = ranked(records)
    places = [text.index(f"<td>{short(record.config)}</td>") for record in best[:5]]
    assert places == sorted(places)
    assert "no such &lt;instruction&gt;" in text and "<instruction>" not in text
    for title in ("Accuracy and time", "Failures", "Time against each parameter", "Importance", "Progress"):
        assert title in text
    for knob in ("schedule", "block_q", "block_k", "cg_max_iters"):
        assert f'"eager.{knob}"' in text
    assert '"Pareto front"' in text and '"wrong"' in text
    assert text.count("Plotly.newPlot(") == 5


def test_the_front_and_the_counts_are_those_of_the_records():
    from lla_compile.tuner import report

    records = search("sqlite://", "cpu/key/run1", 30)
    figure = report._accuracy_time(records)
    correct, front, wrong = figure.data
    assert list(correct.x) == [record.outcome.median_ms for record in ranked(records)]
    assert max(correct.y) <= 1 < min(wrong.y)
    assert list(front.x) == sorted(front.x) and list(front.y) == sorted(front.y, reverse=True)
    for x, y in zip(correct.x, correct.y, strict=True):
        assert any(fx <= x and fy <= y for fx, fy in zip(front.x, front.y, strict=True))


def test_a_search_without_a_correct_configuration_has_a_page(tmp_path, capsys):
    url = f"sqlite:///{tmp_path}/s.sqlite3"
    search(url, "cpu/key/run1", 4, correct=lambda config: False)
    assert run(capsys, url)[0] == 0
    assert "No configuration was correct." in (tmp_path / "report.html").read_text()


def test_studies_are_listed_and_chosen_by_a_part_of_their_name(tmp_path, capsys):
    file = tmp_path / "s.sqlite3"
    for name in ("cpu/forward/run1", "cpu/forward/run2", "cpu/decode/run1"):
        search(f"sqlite:///{file}", name, 3)
    status, out, _ = run(capsys, file, "--list")
    assert (status, out.splitlines()) == (
        0, ["cpu/decode/run1: 3 trials", "cpu/forward/run1: 3 trials", "cpu/forward/run2: 3 trials"],
    )  # fmt: skip
    assert run(capsys, file, "--name", "decode")[1] == "report.html: cpu/decode/run1\n"
    assert "3 studies: choose one with --name: cpu/decode/run1; " in run(capsys, file)[2]
    assert "2 studies with 'forward' in the name" in run(capsys, file, "--name", "forward")[2]
    assert "no studies with 'varlen' in the name: there are: cpu/decode" in run(capsys, file, "--name", "varlen")[2]


def test_the_default_file(tmp_path, capsys):
    status, _, err = run(capsys, "--list")
    assert status == 2 and "nothing has been searched yet" in err and not (tmp_path / "state").exists()
    search(None, "cpu/forward/run1", 3)
    assert run(capsys)[1] == run(capsys, "forward")[1] == "report.html: cpu/forward/run1\n"


def foreign_database(path):
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE recipes (name TEXT)")


def foreign_study(path):
    with quiet_optuna():
        study = optuna.create_study(storage=f"sqlite:///{path}", study_name="soup")
        study.optimize(lambda trial: trial.suggest_float("salt", 0, 1), n_trials=2)


def empty_study(path):
    with quiet_optuna():
        optuna.create_study(storage=f"sqlite:///{path}", study_name="later")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, "there is no file"),
        (lambda path: path.write_text("notes"), "is not a file of searches"),
        (foreign_database, "is not a file of searches"),
        (foreign_study, "study 'soup' is not one of this tuner's"),
        (empty_study, "study 'later' has no finished trial yet"),
    ],
)
def test_wrong_studies_are_one_line_and_left_as_they_are(tmp_path, capsys, make, message):
    path = tmp_path / "s.sqlite3"
    make(path)
    before = path.read_bytes() if path.exists() else None
    status, out, err = run(capsys, path)
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1
    assert (path.read_bytes() if path.exists() else None) == before
    assert not (tmp_path / "report.html").exists()


def test_a_place_that_cannot_be_written_is_refused(tmp_path, capsys):
    search(f"sqlite:///{tmp_path}/s.sqlite3", "cpu/key/run1", 3)
    status, _, err = run(capsys, tmp_path / "s.sqlite3", "--out", tmp_path / "none" / "page.html")
    assert status == 2 and "choose another --out" in err


def test_without_plotly_the_extra_is_named(tmp_path, capsys, monkeypatch):
    search(f"sqlite:///{tmp_path}/s.sqlite3", "cpu/key/run1", 3)
    for name in [name for name in sys.modules if name.partition(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    status, _, err = run(capsys, tmp_path / "s.sqlite3")
    assert status == 2 and "pip install 'lla-compile[report]'" in err


def test_neither_the_package_nor_the_tuner_imports_plotly():
    code = "import sys, lla_compile, lla_compile.tune, lla_compile.report_cli; assert 'plotly' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
