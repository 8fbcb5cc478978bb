"""Time of a visible pair in packed sequences of random lengths, beside a dense batch with about as many pairs."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.report import Benchmark, Row, Target
from benchmarks.timing import Launch, time_all
from benchmarks.training import HEAD_START_MS, PASSES
from lla_compile import lla_attention, lla_attention_varlen
from lla_compile.tuner.outcome import one_line

RIDGE = 1.0
PRECISION = "fast"
SEQUENCES = 8


@dataclass(frozen=True)
class Batch:
    """Sequences of ``lengths`` in ``num_heads`` heads of ``head_dim``."""

    lengths: tuple[int, ...]
    num_heads: int
    head_dim: int

    @property
    def visible_pairs(self) -> int:
        return self.num_heads * sum(length * (length + 1) // 2 for length in self.lengths)

    @property
    def is_dense(self) -> bool:
        return len(set(self.lengths)) == 1

    def inputs(self, dtype: str, device: torch.device) -> list[Tensor]:
        """Standard normal query, key, value and gradient of the output; (B, H, N, D) if dense, else (total, H, D)."""
        generator = torch.Generator(device).manual_seed(0)
        if self.is_dense:
            shape = (len(self.lengths), self.num_heads, self.lengths[0], self.head_dim)
        else:
            shape = (sum(self.lengths), self.num_heads, self.head_dim)
        tensors = torch.randn((4, *shape), generator=generator, device=device)
        return list(tensors.to(getattr(torch, dtype)).unbind())


def random_lengths(total: int, sequences: int, seed: int = 0) -> tuple[int, ...]:
    """``sequences`` positive lengths with the sum ``total``, all such splits alike likely."""
    generator = torch.Generator().manual_seed(seed)
    cuts = (torch.randperm(total - 1, generator=generator)[: sequences - 1] + 1).sort().values.tolist()
    return tuple(end - start for start, end in zip([0, *cuts], [*cuts, total]))


def dense_of(batch: Batch) -> Batch:
    """As many sequences of one length, the multiple of 64 that comes closest in visible pairs."""
    mean_square = sum(length * length for length in batch.lengths) / len(batch.lengths)
    length = 64 * max(1, round(math.sqrt(mean_square) / 64))
    return Batch((length,) * len(batch.lengths), batch.num_heads, batch.head_dim)


def run(options: argparse.Namespace, target: Target) -> list[Row]:
    if options.quick:
        total, num_heads, head_dims = 512, 1, (16,)
    elif target.is_cuda:
        total, num_heads, head_dims = 32768, 4, (64, 128)
    else:
        total, num_heads, head_dims = 2048, 2, (64,)
    packed = [Batch(random_lengths(total, SEQUENCES), num_heads, head_dim) for head_dim in head_dims]
    return [measure(batch, options.dtype, target, options.quick) for batch in packed]


def measure(batch: Batch, dtype: str, target: Target, quick: bool) -> Row:
    dense = dense_of(batch)
    row: Row = {
        "head_dim": batch.head_dim, "num_heads": batch.num_heads, "ridge": RIDGE, "precision": PRECISION,
        "lengths": list(batch.lengths), "dense_lengths": list(dense.lengths),
        "visible_pairs": batch.visible_pairs, "dense_visible_pairs": dense.visible_pairs,
    }  # fmt: skip
    try:
        ends = torch.tensor([0, *batch.lengths]).cumsum(0).to(target.device, torch.int32)
        inputs = {prefix: x.inputs(dtype, target.device) for prefix, x in (("", batch), ("dense_", dense))}
        launches: dict[str, Launch] = {}
        for prefix, tensors in inputs.items():
            cu_seqlens = None if prefix else ends
            launches[f"{prefix}forward"] = _forward(tensors, cu_seqlens)
            launches[f"{prefix}training"] = _training(tensors, cu_seqlens)
        times, failures = time_all(launches, target, quick, HEAD_START_MS)
        row |= {f"{name}_ms": timing.median_ms for name, timing in times.items()}
        row |= {f"{name}_spread": timing.spread for name, timing in times.items()}
        if failures:
            return row | {"failure": next(iter(failures.values()))}
        row["pairs_over_dense"] = batch.visible_pairs / dense.visible_pairs
        for name in PASSES:
            time_over_dense = times[name].median_ms / times[f"dense_{name}"].median_ms
            row[f"{name}_over_dense"] = time_over_dense / row["pairs_over_dense"]
        row["difference"] = _difference(batch, inputs[""], ends)
    except Exception as error:  # recorded as the row's failure; the other widths still run
        row["failure"] = one_line(error)
    return row


def _attend(q: Tensor, k: Tensor, v: Tensor, ends: Tensor | None) -> Tensor:
    if ends is None:
        return lla_attention(q, k, v, RIDGE, precision=PRECISION)
    return lla_attention_varlen(q, k, v, ends, ends, RIDGE, precision=PRECISION)


def _forward(tensors: list[Tensor], ends: Tensor | None) -> Launch:
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    return lambda: _attend(*leaves, ends)


def _training(tensors: list[Tensor], ends: Tensor | None) -> Launch:
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    return lambda: (out := _attend(*leaves, ends), *torch.autograd.grad(out, leaves, tensors[3]))


def _difference(batch: Batch, tensors: list[Tensor], ends: Tensor) -> float:
    """Largest relative difference of output and gradients of the shortest sequence from what it gives alone."""
    shortest = min(range(len(batch.lengths)), key=batch.lengths.__getitem__)
    rows = slice(*ends[shortest : shortest + 2].tolist())
    alone = [x[rows].transpose(0, 1)[None] for x in tensors]
    pairs = zip(_training(tensors, ends)(), _training(alone, None)())
    return max(((x[rows].transpose(0, 1)[None] - y).norm() / y.norm()).item() for x, y in pairs)


BENCHMARK = Benchmark(
    name="varlen",
    about=__doc__,
    run=run,
    columns=(
        "head_dim", "lengths", "dense_lengths", "pairs_over_dense", "forward_ms", "dense_forward_ms",
        "forward_over_dense", "training_ms", "dense_training_ms", "training_over_dense", "difference",
    ),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
