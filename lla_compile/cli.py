"""The console script ``lla-compile``: ``tune``, ``db``, ``doctor``, ``report`` and ``build``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 problems found, 2 wrong usage or input."""
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever reads, such as head, has enough. Python would complain again when it ends; rich's tables return 1 too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: Sequence[str] | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["tune"]:
        # Imported only here, as the report below: they need optuna, which no other command does.
        from lla_compile.tune import main as tune

        return tune(argv[1:]) or 0
    if argv[:1] == ["report"]:
        from lla_compile.report_cli import main as report

        return report(argv[1:])

    from lla_compile import build, db_cli, doctor

    parser = argparse.ArgumentParser(prog="lla-compile", description="Tune Local Linear Attention; manage the results.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{tune,db,doctor,report,build}")
    commands.add_parser("tune", help="search the best plans for this machine (see `lla-compile tune --help`)")
    db_cli.add_arguments(commands.add_parser("db", help="list, show, verify and merge tuned plans"))
    doctor.add_arguments(commands.add_parser("doctor", help="what this machine is, what is tuned for it, what works"))
    commands.add_parser("report", help="an HTML page about a search (see `lla-compile report --help`)")
    build.add_arguments(commands.add_parser("build", help="compile CUDA kernels ahead of time, with no GPU"))
    options = parser.parse_args(argv)
    return options.run(options)
