"""``lla-compile report``: find a search where the tuner left it and write its report."""

from __future__ import annotations

import argparse
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Sequence

import optuna

from lla_compile.tuner.search import evaluated
from lla_compile.tuner.storage import default_file, open_storage
from lla_compile.tuner.study import quiet_optuna, read_decision, read_records

_NAMES_SHOWN = 5
_SQLITE_MAGIC = b"SQLite format 3\0"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 2 wrong usage or nothing to report on."""
    options = _parser().parse_args(argv)
    try:
        with quiet_optuna():
            return _list(options) if options.list else _write(options)
    except (ValueError, optuna.exceptions.StorageInternalError) as error:
        print(f"lla-compile report: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lla-compile report",
        description="Write one self-contained HTML page about a search: best configurations, accuracy against time, "
        "failures, time against each parameter, importance of the parameters. "
        "Needs plotly: pip install 'lla-compile[report]'.",
    )
    parser.add_argument(
        "study", nargs="?", metavar="STUDY",
        help="a file of searches as the tuner leaves it, a storage URL, or the name of a study of the default file; a "
        "part that no other name has is enough (default: the only study there is)",
    )  # fmt: skip
    parser.add_argument("--name", help="name of the study, or a part of it, where STUDY is a file or a URL")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="default: %(default)s")
    parser.add_argument("--list", action="store_true", help="list the studies instead")
    return parser


def _list(options: argparse.Namespace) -> int:
    source, part = _source(options)
    storage = _open(source)
    for name in sorted(n for n in optuna.get_all_study_names(storage) if part is None or part in n):
        study = _load(name, storage)
        try:
            trials, ended = evaluated(read_records(study)), read_decision(study) is not None
        except (KeyError, ValueError, TypeError):
            print(f"{name}: not one of this tuner's")
            continue
        print(f"{name}: {trials} trials{'' if ended else ', not ended'}")
    return 0


def _write(options: argparse.Namespace) -> int:
    source, part = _source(options)
    storage = _open(source)
    study = _load(_choose(optuna.get_all_study_names(storage), part, source), storage)
    try:
        from lla_compile.tuner.report import page

        text = page(study)
    except ImportError as error:
        raise ValueError(f"the report needs plotly ({error}): pip install 'lla-compile[report]'") from None
    try:
        options.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {options.out}: {error.strerror}; choose another --out") from None
    print(f"{options.out}: {study.study_name}")
    return 0


def _source(options: argparse.Namespace) -> tuple[str, str | None]:
    """A file or URL, and the name of the study or a part of it."""
    given = options.study
    if given is None:
        return str(default_file()), options.name
    if "://" in given or Path(given).is_file():
        return given, options.name
    if options.name is not None or Path(given).suffix in (".sqlite3", ".db", ".log"):
        raise ValueError(f"there is no file {given}")
    return str(default_file()), given


def _open(source: str) -> optuna.storages.BaseStorage:
    """Open what is there; a report makes no file and no table of its own.

    Raises:
        ValueError: there is nothing, or something else.
    """
    path = Path(source.removeprefix("sqlite:///").removeprefix("journal://"))
    if "://" in str(path):
        return open_storage(source)
    if not path.is_file():
        raise ValueError(f"there is no file {path}: nothing has been searched yet, or it is kept elsewhere")
    with open(path, "rb") as file:
        head = file.read(len(_SQLITE_MAGIC))
    if head == _SQLITE_MAGIC and _has_studies(path):
        return open_storage(f"sqlite:///{path}")
    if head.startswith(b'{"op_code"'):
        return open_storage(f"journal://{path}")
    raise ValueError(f"{path} is not a file of searches")


def _has_studies(path: Path) -> bool:
    with closing(sqlite3.connect(f"file:{path.absolute()}?mode=ro", uri=True)) as database:
        tables = database.execute("SELECT count(*) FROM sqlite_master WHERE name IN ('studies', 'version_info')")
        return tables.fetchone()[0] == 2


def _choose(names: Sequence[str], part: str | None, source: str) -> str:
    """The study that ``part`` means.

    Raises:
        ValueError: it means none, or several.
    """
    if part in names:
        return part
    fitting = sorted(name for name in names if part is None or part in name)
    if len(fitting) == 1:
        return fitting[0]
    if not names:
        raise ValueError("there is no study in it")
    what = "" if part is None else f" with {part!r} in the name"
    listed = "; ".join((fitting or sorted(names))[:_NAMES_SHOWN])
    count = len(fitting) or "no"
    hint = "choose one with --name" if fitting else "there are"
    raise ValueError(f"{count} studies{what}: {hint}: {listed}{' ...' if len(fitting or names) > _NAMES_SHOWN else ''}")


def _load(name: str, storage: optuna.storages.BaseStorage) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=storage)
