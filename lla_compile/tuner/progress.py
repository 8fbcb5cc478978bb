"""What the user sees: a progress bar on a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lla_compile.key import key_of
from lla_compile.spec import LLASpec
from lla_compile.tuner.session import KeyResult
from lla_compile.tuner.study import Record
from lla_compile.tuning_db.short import short

# Wide enough for a table row where there is no terminal to ask.
_PLAIN_WIDTH = 160


def make_console(**options) -> Console:
    """Where everything is printed; logs and pipes get lines that are not folded at 80 columns."""
    console = Console(highlight=False, **options)
    return console if console.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH, **options)


class ProgressReport:
    """Follows the searches of a command; a context manager.

    Args:
        console: where to print.
        keys: searches to come.
        label: begins each line, where several processes take part in a search and print to one place.
    """

    def __init__(self, console: Console, keys: int, label: str = ""):
        self._label = label
        self.results: list[KeyResult] = []
        self._console = console
        self._keys = keys
        self._best: float | None = None
        self._trials = 0
        self._finished = 0
        self._bar = Progress(
            TextColumn("  trials"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[best]}"),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> ProgressReport:
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def begin(self, spec: LLASpec, trials: int, finished: int) -> None:
        self._trials, self._finished, self._best = trials, finished, None
        if self._label:
            self._print(f"{self._label}  {describe(spec)}")
            return
        title = f"[{len(self.results) + 1}/{self._keys}] {describe(spec)}"
        self._print(title + (f", resumed after {finished} trials" if finished else ""))
        if self._console.is_terminal:
            self._task = self._bar.add_task("", total=trials, completed=finished, best="")

    def trial(self, record: Record) -> None:
        outcome = record.outcome
        self._finished += not record.free
        if outcome.ok and (self._best is None or outcome.median_ms < self._best):
            self._best = outcome.median_ms
        if self._console.is_terminal:
            best = "" if self._best is None else f"best {_time(self._best)}"
            self._bar.update(self._task, completed=self._finished, best=best)
        elif not record.free:
            ending = _time(outcome.median_ms) if outcome.ok else f"{outcome.kind.value}: {outcome.message}"
            place = self._label or f"{self._finished}/{self._trials}"  # no process knows how many the others have done
            self._print(f"  {place} {short(record.config)}: {ending}")

    def end(self, result: KeyResult) -> None:
        self.results.append(result)
        if self._console.is_terminal:
            self._bar.remove_task(self._task)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


def print_results(console: Console, results: Sequence[KeyResult], path: Path) -> None:
    """The table of all searches, and where their winners are."""
    if not results:
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column, justify in (("key", "left"), ("best plan", "left"), ("time", "right"), ("over default", "right"),
                            ("error / limit", "left"), ("trials", "right"), ("failed", "left")):  # fmt: skip
        table.add_column(column, justify=justify, overflow="fold")
    for result in results:
        table.add_row(*map(_plain, _row(result)))
    console.print(table)
    for result in results:
        if result.note:
            console.print(f"{describe(result.spec)}: {result.note}", markup=False, soft_wrap=True)
    if written := sum(not result.note for result in results):
        console.print(f"{written} of {len(results)} written to {path}", markup=False, soft_wrap=True)


def describe(spec: LLASpec) -> str:
    """A key and its sizes in one line."""
    return f"{key_of(spec).describe()}, N {spec.seqlen_k}, B*H {spec.batch_heads}"


def _row(result: KeyResult) -> tuple[str, ...]:
    failed = ", ".join(f"{count} {kind}" for kind, count in result.failed.items() if count) or "none"
    trials = str(result.trials)
    plan = short(result.config) if result.config else "-"
    if result.decision is None:
        return describe(result.spec), plan, "-", "-", "-", trials, failed
    outcome, default_ms = result.decision.outcome, result.decision.default_ms
    gain = "default fails" if default_ms is None else f"{default_ms / outcome.median_ms:.2f}x"
    error = "predicted" if outcome.error is None else f"{outcome.error:.1e} / {outcome.error_limit:.1e}"
    return describe(result.spec), plan, _time(outcome.median_ms), gain, error, trials, failed


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.3f} ms"


def _plain(text: str) -> str:
    """Text that Rich shall not read as markup."""
    return text.replace("[", r"\[")
