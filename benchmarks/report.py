"""What every benchmark shares: its options, the record of where it ran, a table to read and a JSON file to keep."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Callable, Mapping, Sequence

import torch
from rich.table import Table

import lla_compile
from lla_compile.devices import DeviceInfo, identify
from lla_compile.spec import DTYPES
from lla_compile.tuner.progress import make_console
from lla_compile.tuner.toolchain import toolchain

RESULTS = Path(__file__).parent / "results"
Row = dict[str, object]


@dataclass(frozen=True)
class Target:
    """Where a benchmark runs.

    Attributes:
        device: where tensors are made.
        info: which product that is.
    """

    device: torch.device
    info: DeviceInfo

    @classmethod
    def of(cls, name: str) -> Target:
        """The target that ``--device`` means: "auto" is the CUDA device if there is one, else the CPU."""
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", device.index or 0)
            torch.cuda.set_device(device)
        return cls(device, identify(device))

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: rows measured under options.

    Attributes:
        name: stem of its JSON file.
        about: one line for ``--help`` and for the JSON file.
        run: measures; its options have ``quick`` and ``dtype`` beside those of ``add_options``.
        columns: what of a row is printed; the file keeps everything.
        add_options: declares options of its own.
    """

    name: str
    about: str
    run: Callable[[argparse.Namespace, Target], list[Row]]
    columns: tuple[str, ...]
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None

    def parser(self) -> argparse.ArgumentParser:
        parser = common_parser(f"python -m benchmarks.{self.name}", self.about)
        self.add_options(parser)
        return parser

    def measure(self, options: argparse.Namespace) -> Path:
        """Run, print and write; returns the file."""
        target = Target.of(options.device)
        options.dtype = options.dtype or ("bfloat16" if target.is_cuda else "float32")
        rows = self.run(options, target)
        dtype = "" if "dtype" in self.columns else f", {options.dtype}"
        print_rows(f"{self.name} on {target.info.name}{dtype}", self.columns, rows)
        settings = {name: value for name, value in vars(options).items() if name not in ("out", "device")}
        document = {"benchmark": self.name, "about": self.about, "environment": environment(target)}
        document |= {"settings": settings, "rows": rows}
        path = options.out / target.info.id / f"{self.name}.json"
        write_json(path, document)
        return path

    def main(self, argv: Sequence[str] | None = None) -> int:
        print(self.measure(self.parser().parse_args(argv)))
        return 0


def common_parser(prog: str, about: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(prog=prog, description=about)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of results (default: benchmarks/results)")
    return parser


def environment(target: Target) -> dict[str, object]:
    """Date, device and versions: without them a figure means nothing."""
    info = target.info
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": {"id": info.id, "name": info.name, "compute_capability": info.compute_capability, "sms": info.sms},
        "host": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "lla_compile": lla_compile.__version__,
            "python": platform.python_version(),
            **toolchain(target.device.type),
        },
    }


def write_json(path: Path, document: Mapping) -> None:
    """A figure that is not finite becomes its name, since JSON has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_plain(document), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def print_rows(title: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """The chosen columns of rows; what failed says so in the last one."""
    table = Table(title=title, box=None, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left")
    failed = any(row.get("failure") for row in rows)
    for column in (*columns, *(["failure"] if failed else [])):
        table.add_column(column.replace("_", " "), overflow="fold", no_wrap=column == "op")
    for row in rows:
        cells = [shown(row.get(column)) for column in columns]
        table.add_row(*cells, *([str(row.get("failure") or "")] if failed else []))
    make_console(markup=False).print(table)
    sys.stdout.flush()


def shown(value: object) -> str:
    """A cell: three digits of a float, nothing for what was not measured."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _plain(value):
    if isinstance(value, Mapping):
        return {str(name): _plain(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int)) else str(value)
