"""How many iterations of conjugate gradients LLA needs: recall, trained and tested with at most T of them.

A model for every T of ``--iterations`` 1, 3, 5, 10 and every kind of ridge: a number for all queries, or learned for
each head and token as the sigmoid of a linear map ("token"). Conjugate gradients stops earlier where it has converged.
Softmax attention, which is what T = 0 would give, is trained beside them. Models and batches are those of
train_recall.py, with ``lla_compile.nn.LocalLinearAttention`` for its attention.

Writes cg_ablation.json and .png to --out.

    python examples/cg_ablation.py            # half an hour on a busy CPU
    python examples/cg_ablation.py --quick    # seconds: too short to learn the task
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Sequence

import torch
import train_recall
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

from lla_compile.nn import LocalLinearAttention

RIDGES = (1.0, 0.1, "token")


class ConvolvedAttention(nn.Module):
    """LocalLinearAttention behind a short causal convolution that lets a value see its key."""

    def __init__(self, dim: int, heads: int, ridge: float | str, iterations: int):
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, kernel_size=3, groups=dim)
        self.attention = LocalLinearAttention(dim, heads, ridge=ridge, cg_max_iters=iterations)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.conv(F.pad(x.mT, (2, 0))).mT)


def make_model(ridge: float | str, iterations: int, options: argparse.Namespace) -> nn.Module:
    """The model of train_recall.py with other attention."""
    model = train_recall.Recall(options, "softmax")
    for block in model.blocks:
        block.attention[1] = ConvolvedAttention(options.dim, options.heads, ridge, iterations)
    return model


def save(results: list[dict], options: argparse.Namespace) -> None:
    """Write cg_ablation.json and .png, the recall of most pairs over the iterations."""
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {
        name: getattr(options, name) for name in (*train_recall.SIZES, "batch", "vocab", "lr", "seed", "device")
    }
    document = {"settings": settings | {"torch": torch.__version__}, "results": results}
    (options.out / "cg_ablation.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install -e '.[examples]' brings matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    for ridge in RIDGES:
        points = [(x["iterations"], x["accuracy"]) for x in results if x["ridge"] == ridge]
        axes.plot(*zip(*points), "o-", label=f"ridge of each {ridge}" if ridge == "token" else f"ridge {ridge:g}")
    for result in results:
        if result["ridge"] is None:
            axes.axhline(result["accuracy"], color="grey", linestyle="--", label="softmax")
    axes.set(xlabel="iterations", ylabel="accuracy", ylim=(0, 1.02), title=f"Recall of {options.pairs} pairs")
    axes.legend()
    figure.savefig(options.out / "cg_ablation.png", dpi=80, pil_kwargs={"optimize": True})
    pyplot.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 3, 5, 10])
    parser.add_argument("--steps", type=int, help="of training (default: 400 on a CPU)")
    parser.add_argument("--pairs", type=int, help="of a sequence (default: 16 on a CPU)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("cg_ablation"), help="directory of the results")
    parser.add_argument("--quick", action="store_true", help="seconds: too short to learn the task")
    given = parser.parse_args(argv)
    if min(given.iterations) < 1:
        parser.error(f"--iterations must be at least 1, got {min(given.iterations)}")
    passed_on = ["--device", given.device, "--seed", str(given.seed), *(["--quick"] if given.quick else [])]
    for name in ("steps", "pairs"):
        if getattr(given, name) is not None:
            passed_on += [f"--{name}", str(getattr(given, name))]
    options = train_recall.parse(passed_on)
    options.iterations, options.out = given.iterations, given.out
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Train, save, print; returns 130 after an interrupt, else 0."""
    options = parse(argv)
    torch.set_num_threads(1)  # as train_recall.py
    runs = [(None, 0), *itertools.product(RIDGES, options.iterations)]
    results = []
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[said]}")) as progress:
        for ridge, iterations in runs:
            name = "softmax" if ridge is None else f"ridge {ridge}, T {iterations}"
            task = progress.add_task(name, total=options.steps, said="")

            def advance(said: str, task=task) -> None:
                progress.update(task, advance=1, said=said)

            def model(options: argparse.Namespace, kind: str, ridge=ridge, iterations=iterations) -> nn.Module:
                return train_recall.Recall(options, kind) if ridge is None else make_model(ridge, iterations, options)

            curve = train_recall.train("softmax", options, advance, model)
            if curve["interrupted"]:
                return 130
            by_pairs = curve["accuracy_by_pairs"]
            result = {"ridge": ridge, "iterations": iterations, "accuracy": by_pairs[max(by_pairs)]}
            results.append(result | {"accuracy_by_pairs": by_pairs, "seconds": round(curve["seconds"])})
            save(results, options)
    for result in results:
        name = "softmax" if result["ridge"] is None else f"ridge {result['ridge']}, T {result['iterations']}"
        print(f"{name:24} recall of {options.pairs} pairs {result['accuracy']:.1%} ({result['seconds']} s)")
    print(f"chance {1 / options.vocab:.1%}; {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
