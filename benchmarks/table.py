"""The README's tables, as Markdown, from the JSON files of one device.

    python -m benchmarks.table nvidia-h200
    python -m benchmarks.table nvidia-h200 --into README.md
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Iterable, Sequence

from benchmarks.comparison import RIDGES
from benchmarks.report import RESULTS, write_text
from benchmarks.solver import DEFAULT, TILE
from lla_compile.spec import PRECISIONS

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__.partition("\n")[0])
    parser.add_argument("device", help="a directory of the results, e.g. nvidia-h200")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--into", type=Path, help="put the tables between the marks of this file instead of printing")
    options = parser.parse_args(argv)
    text = tables(options.results / options.device)
    if options.into is None:
        print(text)
        return 0
    page = options.into.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        parser.error(f"{options.into} has no marks {BEGIN} and {END}")
    write_text(options.into, f"{before}{BEGIN}\n{text}\n{END}{after}")
    return 0


def tables(directory: Path) -> str:
    """Markdown of what the directory has; a benchmark without a file is left out."""
    sections = {
        "forward": _forward, "training": _training, "varlen": _varlen, "decode": _decode, "accuracy": _accuracy,
        "gradients": _gradients, "sweeps": _sweeps, "solver": _solver, "memory": _memory, "overhead": _overhead,
    }  # fmt: skip
    parts = []
    for name, section in sections.items():
        path = directory / f"{name}.json"
        if path.exists():
            document = json.loads(path.read_text(encoding="utf-8"))
            parts += [_where(document["environment"]), section(document["rows"])]
    # The benchmarks of one run share their first line.
    return "\n\n".join(dict.fromkeys(parts))


def _where(environment: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"{environment['device']['name']}, {environment['date'][:10]}; {versions}."


def _forward(rows: list[dict]) -> str:
    return "Forward, causal, milliseconds:\n\n" + _times(rows, "median_ms")


def _training(rows: list[dict]) -> str:
    return "Forward and backward, causal, milliseconds:\n\n" + _times(rows, "training_ms")


def _times(rows: list[dict], name: str) -> str:
    """A line for each shape; where an operator ran at several ridges, their times in one cell."""
    ridges = " / ".join(f"{ridge:g}" for ridge in RIDGES)
    columns = [("sdpa", "softmax (SDPA)", None)]
    columns += [("lla_attention", f"`{precision}`, λ {ridges}", precision) for precision in PRECISIONS]
    for op in dict.fromkeys(row["op"] for row in rows if row["op"] not in ("sdpa", "lla_attention")):
        own = dict.fromkeys(f"{row['ridge']:g}" for row in rows if row["op"] == op and row["ridge"] is not None)
        columns.append((op, f"{op}, λ {' / '.join(own)}" if own else op, None))
    lines = []
    for shape in dict.fromkeys((row["seqlen"], row["head_dim"], row["batch_heads"]) for row in rows):
        here = [row for row in rows if (row["seqlen"], row["head_dim"], row["batch_heads"]) == shape]
        cells = [
            " / ".join(_cell(row, name) for row in here if (row["op"], row["precision"]) == (op, precision))
            for op, _, precision in columns
        ]
        lines.append((*shape, *cells))
    return _markdown(["N", "D", "B·H", *(title for _, title, _ in columns)], lines)


def _varlen(rows: list[dict]) -> str:
    lines = [
        (
            row["head_dim"],
            row["num_heads"],
            ", ".join(map(str, row["lengths"])),
            f"{len(row['dense_lengths'])} x {row['dense_lengths'][0]}",
            *(f"{_cell(row, f'{x}_ms')} ({_cell(row, f'{x}_over_dense')})" for x in ("forward", "training")),
        )
        for row in rows
    ]
    about = "Packed sequences, milliseconds (time of a visible pair over that of an equal dense batch):"
    header = ["D", "H", "lengths", "dense batch", "forward", "forward and backward"]
    return f"{about}\n\n" + _markdown(header, lines)


def _decode(rows: list[dict]) -> str:
    return "\n\n".join((_decode_times(rows), _decode_errors(rows)))


def _decode_times(rows: list[dict]) -> str:
    timed = [row for row in rows if row["part"] == "time"]
    shown = [("median_ms", "time_over_sdpa", "")]
    if any("graph_ms" in row for row in timed):
        shown.append(("graph_ms", "graph_over_sdpa", ", graph"))
    sizes = ("seqlen", "head_dim", "batch_heads", "group")
    lines = []
    for shape in dict.fromkeys(tuple(row[name] for name in sizes) for row in timed):
        here = {row["precision"]: row for row in timed if tuple(row[name] for name in sizes) == shape}
        softmax = here.pop(None)
        cells = [_cell(softmax, "floor_ms"), *(_cell(softmax, time) for time, _, _ in shown)]
        for precision in PRECISIONS:
            row = here[precision]
            ratios = ["" if row.get("failure") else f" ({_cell(row, ratio)})" for _, ratio, _ in shown]
            cells += [_cell(row, time) + ratio for (time, _, _), ratio in zip(shown, ratios)]
        lines.append((*shape, *cells))
    ops = ("softmax (SDPA)", *(f"`{precision}`" for precision in PRECISIONS))
    titles = [f"{op}{how}" for op in ops for _, _, how in shown]
    about = (
        "A decoding step of one token, milliseconds (over softmax attention); the floor is the cache's bytes over the "
        "peak bandwidth:"
    )
    return f"{about}\n\n" + _markdown(["M", "D", "B·H", "group", "floor", *titles], lines)


def _decode_errors(rows: list[dict]) -> str:
    errors = [row for row in rows if row["part"] == "error"]
    lines = []
    for case in dict.fromkeys((row["dtype"], row["head_dim"], row["ridge"]) for row in errors):
        found = {row["precision"]: row for row in errors if (row["dtype"], row["head_dim"], row["ridge"]) == case}
        lines.append((*case, *(_cell(found[precision], "error") for precision in PRECISIONS)))
    lengths = [int(keys) for row in errors for found in row["errors"].values() for keys in found]
    about = f"Largest error of a decoding step against float64, lengths from 1 to {max(lengths, default='-')} keys:"
    return f"{about}\n\n" + _markdown(["dtype", "D", "λ", *(f"`{precision}`" for precision in PRECISIONS)], lines)


def _accuracy(rows: list[dict]) -> str:
    columns = dict.fromkeys((row["precision"], row["cg_max_iters"]) for row in rows)
    lines = []
    for case in dict.fromkeys((row["dtype"], row["head_dim"], row["ridge"]) for row in rows):
        found = {
            (row["precision"], row["cg_max_iters"]): row
            for row in rows
            if (row["dtype"], row["head_dim"], row["ridge"]) == case
        }
        lines.append((*case, *(_cell(found.get(column, {}), "error") for column in columns)))
    titles = [f"`{precision}`, {cap} iterations" for precision, cap in columns]
    about = f"Error against float64, N {rows[0]['seqlen']}, at most so many CG iterations:"
    return f"{about}\n\n" + _markdown(["dtype", "D", "λ", *titles], lines)


def _gradients(rows: list[dict]) -> str:
    names = ("error_dq", "error_dk", "error_dv", "error_dridge", "error_dscale_rows")
    precisions = dict.fromkeys(row["precision"] for row in rows)
    lines = []
    for case in dict.fromkeys((row["dtype"], row["seqlen"], row["head_dim"], row["ridge"]) for row in rows):
        found = {
            row["precision"]: row
            for row in rows
            if (row["dtype"], row["seqlen"], row["head_dim"], row["ridge"]) == case
        }
        cells = [" / ".join(_cell(found.get(precision, {}), name) for name in names) for precision in precisions]
        lines.append((*case, *cells))
    titles = [f"`{precision}`: dq / dk / dv / dλ / dscale" for precision in precisions]
    about = "Error of the gradients against float64; of dscale, a sum over all rows, relative to the norm of its terms:"
    return f"{about}\n\n" + _markdown(["dtype", "N", "D", "λ", *titles], lines)


def _solver(rows: list[dict]) -> str:
    columns = dict.fromkeys((row["solve"], row["variant"]) for row in rows)
    lines = []
    for case in dict.fromkeys((row["keys"], row["head_dim"], row["ridge"]) for row in rows):
        found = {
            (row["solve"], row["variant"]): row
            for row in rows
            if (row["keys"], row["head_dim"], row["ridge"]) == case
        }
        lines.append((*case, *(_cell(found.get(column, {}), f"pairs_{DEFAULT}") for column in columns)))
    about = (
        f"Iterations of a {TILE}-row tile to {DEFAULT}, weighted by its visible pairs, simulated in float64, "
        f"N {rows[0]['seqlen']}:"
    )
    return f"{about}\n\n" + _markdown(["keys", "D", "λ", *(f"{x}: {y}" for x, y in columns)], lines)


def _sweeps(rows: list[dict]) -> str:
    lines = [
        (*(row[name] for name in ("seqlen", "head_dim", "batch_heads", "precision")), _cell(row, "tflops"))
        for row in rows
    ]
    about = "One CG iteration of the split schedule (flops as the equations have them, visible pairs only):"
    return f"{about}\n\n" + _markdown(["N", "D", "B·H", "precision", "TFLOP/s"], lines)


def _memory(rows: list[dict]) -> str:
    shape = ("seqlen", "head_dim", "batch_heads")
    lines = [
        (
            row.get("passes", "forward"),
            *(row[name] for name in shape),
            *(_cell(row, f"{x}_mib") for x in ("extra", "output")),
        )
        for row in rows
    ]
    about = "Peak memory beyond inputs, output and gradients, MiB:"
    return f"{about}\n\n" + _markdown(["passes", "N", "D", "B·H", "extra", "output"], lines)


def _overhead(rows: list[dict]) -> str:
    return "Host time, microseconds:\n\n" + _markdown(
        ["what", "median"], [(row["what"], _cell(row, "median_us")) for row in rows]
    )


def _cell(row: dict, name: str) -> str:
    if row.get("failure"):
        return "fails"
    value = row.get(name)
    if not isinstance(value, (int, float)):
        return str(value or "-")
    return f"{value:.1e}" if name.startswith("error") else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _markdown(header: Sequence[str], lines: Iterable[Sequence]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
