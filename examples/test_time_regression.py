"""Regression at test time over a sequence that is linear in pieces: LLA, softmax attention and ridge regression.

The task of Figure 3 of arXiv 2510.01450, as far as its text settles it. At every position a method sees the pairs (key,
value) before it and predicts the value of the next key; nothing is trained. A sequence of ``--length`` 1024 is cut into
segments. Segment s has its own region of keys and its own linear map:

    key = spread * m_s + U_s z,   value = (A_s key) / sqrt(1 + spread^2) + 0.1 noise

with m_s, z and the noise standard normal, A_s normal with variance 1 / dim, and U_s an orthonormal basis of ``--rank``
dimensions, scaled so that U_s z has variance 1. Values have variance 1; the error is measured against those without
noise. Keys have to tell which segment they are of: attention knows nothing else of it. With the full rank, 64, a
segment of 64 pairs does not determine its map, even to who knows where it starts; by default the rank is half of that.

Methods and what is chosen for each, on sequences of their own (``--validation``), by the mean error, for each segment
size:
    lla      lla_attention: scale and ridge
    softmax  scaled_dot_product_attention: scale
    ridge    ridge regression over all the past, updated pair by pair (recursive least squares, float64): its ridge

Writes test_time_regression.json and .png to --out.

    python examples/test_time_regression.py            # 10 minutes on two CPU cores
    python examples/test_time_regression.py --quick    # seconds
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F

from lla_compile import lla_attention

NOISE, SPREAD = 0.1, 1.0
# Grids; scales in units of dim ** -0.5, ridges of LLA relative to the sum of the weights.
SCALES = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)
LLA_RIDGES = (1.0, 0.1, 0.01, 0.001)
RIDGES = (1000.0, 100.0, 10.0, 1.0, 0.1)
BINS = 32  # points of a curve over the positions
LABELS = {"lla": "LLA", "softmax": "softmax attention", "ridge": "ridge regression"}


class Sequences(NamedTuple):
    """Keys, values and values without noise, (count, length, dim)."""

    k: Tensor
    v: Tensor
    target: Tensor

    @property
    def query(self) -> Tensor:
        """The key to predict the value of, at each position but the first: (1, count, length - 1, dim)."""
        return self.k[None, :, 1:]

    @property
    def past(self) -> tuple[Tensor, Tensor]:
        """Keys and values before each of these, under a causal mask."""
        return self.k[None, :, :-1], self.v[None, :, :-1]


def make_sequences(count: int, segment: int, options: argparse.Namespace, seed: int) -> Sequences:
    """``count`` sequences of ``options.length`` pairs of width ``options.dim`` in segments of ``segment`` pairs."""
    generator = torch.Generator().manual_seed(seed)
    dim, rank, pieces = options.dim, options.rank, options.length // segment

    def normal(*shape: int) -> Tensor:
        return torch.randn(count, pieces, *shape, generator=generator)

    basis = torch.linalg.qr(normal(dim, rank)).Q * math.sqrt(dim / rank)
    k = SPREAD * normal(1, dim) + normal(segment, rank) @ basis.mT
    target = k @ normal(dim, dim) / math.sqrt(dim * (1 + SPREAD**2))
    v = target + NOISE * normal(segment, dim)
    return Sequences(*(x.flatten(1, 2).to(options.device) for x in (k, v, target)))


def predict_lla(data: Sequences, scale: float, ridge: float) -> Tensor:
    """Predictions (count, length - 1, dim); ``scale`` in units of dim ** -0.5, in the others too."""
    scale *= data.k.shape[2] ** -0.5
    return lla_attention(data.query, *data.past, ridge, scale=scale, cg_max_iters=128)[0]


def predict_softmax(data: Sequences, scale: float) -> Tensor:
    scale *= data.k.shape[2] ** -0.5
    return F.scaled_dot_product_attention(data.query, *data.past, is_causal=True, scale=scale)[0]


def predict_ridge(data: Sequences, ridge: float) -> Tensor:
    """The map that minimises sum_j |v_j - W k_j|^2 + ridge |W|^2 over the past, at the next key."""
    k, v = data.k.double(), data.v.double()
    count, length, dim = k.shape
    inverse = torch.eye(dim, dtype=k.dtype, device=k.device).expand(count, dim, dim) / ridge
    weights = torch.zeros_like(inverse)
    out = torch.empty_like(v)
    for i in range(length):
        x = k[:, i, :, None]
        out[:, i] = (weights @ x).squeeze(2)
        direction = inverse @ x
        gain = direction / (1 + x.mT @ direction)
        weights = weights + (v[:, i] - out[:, i])[:, :, None] * gain.mT
        inverse = inverse - gain * direction.mT
    return out[:, 1:].to(data.v.dtype)


METHODS: dict[str, tuple[Callable[..., Tensor], list[tuple[float, ...]]]] = {
    "lla": (predict_lla, list(itertools.product(SCALES, LLA_RIDGES))),
    "softmax": (predict_softmax, [(scale,) for scale in SCALES]),
    "ridge": (predict_ridge, [(ridge,) for ridge in RIDGES]),
}


def errors(prediction: Tensor, data: Sequences) -> Tensor:
    """Squared error of each position but the first, (count, length - 1)."""
    return (prediction - data.target[:, 1:]).square().mean(-1)


def compare(segment: int, options: argparse.Namespace, advance: Callable[[], None]) -> dict:
    """Choose for every method, then measure it.

    Args:
        segment: pairs of a segment.
        options: of the command line.
        advance: called after every choice that was tried.

    Returns:
        For every method ``chosen``, ``mse`` with its standard error over sequences, and ``curve``, the error averaged
        over ``BINS`` equal parts of the sequence.
    """
    validation = make_sequences(options.validation, segment, options, options.seed + 1)
    data = make_sequences(options.sequences, segment, options, options.seed + 2)
    results = {}
    for name, (predict, grid) in METHODS.items():
        tried = {}
        for choice in grid:
            tried[choice] = errors(predict(validation, *choice), validation).mean().item()
            advance()
        chosen = min(tried, key=tried.get)
        by_position = errors(predict(data, *chosen), data)
        by_sequence = by_position.mean(1)
        results[name] = {
            "chosen": chosen,
            "mse": by_sequence.mean().item(),
            "standard_error": (by_sequence.std() / math.sqrt(len(by_sequence))).item(),
            "curve": [part.mean().item() for part in by_position.mean(0).tensor_split(BINS)],
        }
    return results


def save(results: dict[int, dict], options: argparse.Namespace, seconds: float) -> None:
    """Write test_time_regression.json and .png."""
    options.out.mkdir(parents=True, exist_ok=True)
    names = ("dim", "length", "rank", "validation", "sequences", "seed", "device")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"noise": NOISE, "spread": SPREAD, "scales": SCALES, "lla_ridges": LLA_RIDGES, "ridges": RIDGES}
    document = {"settings": settings | {"torch": torch.__version__}, "seconds": round(seconds), "segments": results}
    path = options.out / "test_time_regression.json"
    path.write_text(json.dumps(_rounded(document), indent=1) + "\n", encoding="utf-8")
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install -e '.[examples]' brings matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = math.ceil((len(results) + 1) / 3)
    figure, grid = pyplot.subplots(rows, 3, figsize=(8, 2.5 * rows), sharey=True, squeeze=False, layout="constrained")
    *panels, last = list(grid.flat)[: len(results) + 1]
    for axes in list(grid.flat)[len(results) + 1 :]:
        axes.remove()
    positions = (torch.arange(BINS) + 0.5) * options.length / BINS
    for axes, (segment, methods) in zip(panels, results.items()):
        for name, result in methods.items():
            axes.plot(positions, result["curve"], label=LABELS[name])
        axes.set(title=f"segments of {segment}", xlabel="position")
    for name, label in LABELS.items():
        last.plot(list(results), [methods[name]["mse"] for methods in results.values()], "o-", label=label)
    last.set_xscale("log", base=2)
    last.set(title="mean", xlabel="segment size", ylim=(0, None))
    for row in grid:
        row[0].set_ylabel("mean squared error")
    last.legend()
    figure.savefig(options.out / "test_time_regression.png", dpi=72, pil_kwargs={"optimize": True})
    pyplot.close(figure)


def _rounded(x):
    """``x`` with its numbers cut to 4 digits, for files."""
    if isinstance(x, dict):
        return {name: _rounded(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_rounded(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dim", type=int, help="width of keys and values (default: 64)")
    parser.add_argument("--length", type=int, help="pairs of a sequence (default: 1024)")
    parser.add_argument("--segments", type=int, nargs="+", help="segment sizes (default: 64 128 256 512 1024)")
    parser.add_argument("--rank", type=int, help="dimensions that the keys of a segment vary in (default: dim / 2)")
    parser.add_argument("--validation", type=int, default=2, help="sequences to choose on (default: 2)")
    parser.add_argument("--sequences", type=int, default=8, help="sequences to measure on (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("test_time_regression"), help="directory of the results")
    parser.add_argument("--quick", action="store_true", help="seconds: width 8, 128 pairs")
    options = parser.parse_args(argv)
    defaults = (8, 128, [16, 128]) if options.quick else (64, 1024, [64, 128, 256, 512, 1024])
    for name, default in zip(("dim", "length", "segments"), defaults):
        if getattr(options, name) is None:
            setattr(options, name, default)
    options.rank = options.rank or options.dim // 2
    if not 1 <= options.rank <= options.dim:
        parser.error(f"--rank must be from 1 to --dim ({options.dim}), got {options.rank}")
    if bad := [segment for segment in options.segments if segment < 1 or options.length % segment]:
        parser.error(f"--segments must divide --length ({options.length}), got {bad}")
    if options.length <= BINS or options.sequences < 2 or options.validation < 1:
        parser.error(f"--length must be more than {BINS}, --sequences at least 2, --validation at least 1")
    return options


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    """Compare, save, print."""
    options = parse(argv)
    start = time.perf_counter()
    tries = sum(len(grid) for _, grid in METHODS.values())
    results = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        for segment in options.segments:
            task = progress.add_task(f"segments of {segment}", total=tries)
            results[segment] = compare(segment, options, lambda: progress.advance(task))
    save(results, options, time.perf_counter() - start)
    print(f"{'segment':>8}" + "".join(f"{name:>18}" for name in METHODS))
    for segment, methods in results.items():
        shown = (f"{result['mse']:.3f} +- {result['standard_error']:.3f}" for result in methods.values())
        print(f"{segment:8}" + "".join(f"{text:>18}" for text in shown))
    print(f"mean squared errors; {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
