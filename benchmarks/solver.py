"""Where the conjugate-gradient iterations go, and what starts, preconditioners and tolerances would change: simulated.

Dense covariances in float64, one head, random normal inputs, causal. No kernel runs. A tile turns its loop until its
slowest row is done, so a tile of 64 queries costs the largest count of its rows.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from benchmarks.report import Benchmark, Row, Target
from lla_compile.tuner.outcome import one_line

TILE = 64  # query rows
RIDGES = (1.0, 0.1, 0.01)
TOLERANCES = {"1e-2.5": 10**-2.5, "1e-3": 1e-3, "1e-3.5": 10**-3.5}
DEFAULT = "1e-3"
MAX_ITERATIONS = 1000
# Largest over smallest eigenvalue of the keys' covariance, whose mean eigenvalue is 1.
KEYS = {"normal": 1.0, "anisotropic": 100.0}


@dataclass(frozen=True)
class System:
    """The linear systems (C_i + ridge I) x_i = right_i of one head.

    Attributes:
        matrix: C_i + ridge I, (N, D, D).
        delta, t: right sides of the solve for the probe and of the adjoint solve, (N, D).
        probe: u_i, the solution for ``delta``, (N, D).
        key_matrix: the covariance of all keys + ridge I, (D, D).
    """

    matrix: Tensor
    delta: Tensor
    t: Tensor
    probe: Tensor
    key_matrix: Tensor

    @classmethod
    def random(cls, seqlen: int, head_dim: int, condition: float, ridge: float, device: torch.device) -> System:
        """Of standard normal queries, values and output gradients, and keys of the given condition number."""
        generator = torch.Generator().manual_seed(0)
        q, k, v, g = torch.randn((4, seqlen, head_dim), generator=generator, dtype=torch.float64).to(device).unbind()
        variances = torch.logspace(0, math.log10(condition), head_dim, dtype=torch.float64, device=device)
        k = k * (variances / variances.mean()).sqrt()
        visible = torch.ones(seqlen, seqlen, dtype=torch.bool, device=device).tril()
        p = (q @ k.T * head_dim**-0.5).masked_fill(~visible, -torch.inf).softmax(-1)
        gamma = g @ v.T
        kbar, gbar = p @ k, (p * gamma).sum(-1, keepdim=True)
        identity = torch.eye(head_dim, dtype=torch.float64, device=device)
        matrix = torch.stack([(k.T * row) @ k for row in p]) - kbar[:, :, None] * kbar[:, None, :] + ridge * identity
        delta, t = kbar - q, (p * gamma) @ k - gbar * kbar
        probe = torch.linalg.solve(matrix, delta)
        return cls(matrix, delta, t, probe, torch.cov(k.T) + ridge * identity)

    def tile_mean(self) -> Tensor:
        """mean_i C_i + ridge I over the rows of each tile, one for every row, (N, D, D)."""
        means = torch.stack([tile.mean(0) for tile in self.matrix.split(TILE)])
        return means.repeat_interleave(TILE, 0)[: len(self.matrix)]

    def projected_probe(self) -> Tensor:
        """alpha u with alpha = (u.t) / (u.delta): of all multiples of the probe the best start of the adjoint solve.

        Its image is known without a product, A alpha u = alpha delta.
        """
        alpha = (self.probe * self.t).sum(-1, keepdim=True) / (self.probe * self.delta).sum(-1, keepdim=True)
        return alpha * self.probe


def count(matrix: Tensor, right: Tensor, start: Tensor | None = None, preconditioner: Tensor | None = None) -> Tensor:
    """Iterations of conjugate gradients by row until ||r|| <= tolerance * ||right||.

    Args:
        matrix: (N, D, D).
        right: (N, D).
        start: first iterate (N, D), zero by default.
        preconditioner: stands for the matrix, its inverse is applied to the residual: (N, D, D) or (D, D).

    Returns:
        (tolerances, N), in the order of TOLERANCES; MAX_ITERATIONS where one was not reached.
    """
    inverse = None if preconditioner is None else torch.linalg.inv(preconditioner)
    limits = torch.tensor(list(TOLERANCES.values()), dtype=right.dtype, device=right.device)[:, None]
    limits = limits * right.norm(dim=-1)
    x = torch.zeros_like(right) if start is None else start
    r = right - _apply(matrix, x)
    z = r if inverse is None else _apply(inverse, r)
    p, rz = z, (r * z).sum(-1, keepdim=True)
    counts = torch.full(limits.shape, MAX_ITERATIONS, dtype=torch.int32, device=right.device)
    for done in range(MAX_ITERATIONS + 1):
        counts = torch.where(r.norm(dim=-1) <= limits, counts.clamp(max=done), counts)
        if (counts <= done).all():
            break
        image = _apply(matrix, p)
        curvature = (p * image).sum(-1, keepdim=True)
        step = torch.where(curvature > 0, rz / curvature, 0)
        r = r - step * image
        z = r if inverse is None else _apply(inverse, r)
        before, rz = rz, (r * z).sum(-1, keepdim=True)
        p = z + torch.where(before > 0, rz / before, 0) * p
    return counts


def _apply(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x[:, :, None])[:, :, 0]


# Every way to solve, by right side: what it is called and how it counts.
VARIANTS: dict[tuple[str, str], Callable[[System], Tensor]] = {
    ("probe", "plain"): lambda s: count(s.matrix, s.delta),
    ("probe", "tile mean"): lambda s: count(s.matrix, s.delta, preconditioner=s.tile_mean()),
    ("probe", "key covariance"): lambda s: count(s.matrix, s.delta, preconditioner=s.key_matrix),
    ("adjoint", "plain"): lambda s: count(s.matrix, s.t),
    ("adjoint", "start"): lambda s: count(s.matrix, s.t, s.projected_probe()),
    ("adjoint", "tile mean"): lambda s: count(s.matrix, s.t, preconditioner=s.tile_mean()),
    ("adjoint", "start, tile mean"): lambda s: count(s.matrix, s.t, s.projected_probe(), s.tile_mean()),
    ("adjoint", "key covariance"): lambda s: count(s.matrix, s.t, preconditioner=s.key_matrix),
}


@torch.no_grad()
def run(options: argparse.Namespace, target: Target) -> list[Row]:
    seqlen, head_dims = (160, (16,)) if options.quick else (1024, (64, 128))
    rows: list[Row] = []
    for head_dim, keys, ridge in itertools.product(head_dims, KEYS, RIDGES):
        system = System.random(seqlen, head_dim, KEYS[keys], ridge, target.device)
        for (solve, variant), solver in VARIANTS.items():
            row = {"seqlen": seqlen, "head_dim": head_dim, "dtype": "float64", "keys": keys, "ridge": ridge}
            row |= {"solve": solve, "variant": variant}
            rows.append(row)
            try:
                row |= summary(solver(system).double().cpu(), head_dim)
            except Exception as error:  # recorded as the row's failure; the others still run
                row["failure"] = one_line(error)
    return rows


def summary(counts: Tensor, head_dim: int) -> Row:
    """What is kept of iteration counts (tolerances, N).

    ``tile_<tolerance>`` is the mean over tiles of the largest count of their rows, ``pairs_<tolerance>`` the same
    weighted by the visible pairs of the tiles: that is what the time follows.
    """
    row: Row = {}
    seqlen = counts.shape[1]
    keys = torch.arange(1.0, seqlen + 1, dtype=torch.float64)
    work = torch.stack([tile.sum() for tile in keys.split(TILE)])
    for name, by_row in zip(TOLERANCES, counts):
        tiles = torch.stack([tile.max() for tile in by_row.split(TILE)])
        row[f"tile_{name}"] = tiles.mean().item()
        row[f"pairs_{name}"] = ((tiles * work).sum() / work.sum()).item()
        if name == DEFAULT:
            row |= {"row_mean": by_row.mean().item(), "row_max": int(by_row.max())}
            row["tiles"] = [int(x) for x in tiles]
            row["by_keys"] = {
                f"{low + 1} to {high}": {"mean": part.mean().item(), "max": int(part.max())}
                for low, high in _buckets(seqlen, head_dim)
                for part in [by_row[low:high]]
            }
    few, *_, many = row["by_keys"].values()
    return row | {"few_keys": few["mean"], "many_keys": many["mean"]}


def _buckets(seqlen: int, head_dim: int) -> list[tuple[int, int]]:
    """Ranges of rows: those that see fewer keys than there are dimensions, then octaves."""
    ends = [0, head_dim - 1, 2 * head_dim]
    while ends[-1] < seqlen:
        ends.append(2 * ends[-1])
    ends = [end for end in ends if end < seqlen] + [seqlen]
    return list(zip(ends, ends[1:]))


BENCHMARK = Benchmark(
    name="solver",
    about=__doc__,
    run=run,
    columns=(
        "head_dim", "dtype", "keys", "ridge", "solve", "variant", *(f"tile_{name}" for name in TOLERANCES),
        f"pairs_{DEFAULT}", "row_mean", "row_max", "few_keys", "many_keys",
    ),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
