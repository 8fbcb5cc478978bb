"""Time of a visible pair in packed sequences of random lengths, beside a dense batch with about as many pairs."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import launches
from benchmarks.peers import Peer
from benchmarks.report import Benchmark, Row, Target
from benchmarks.timing import Launch, time_all
from lla_compile import lla_attention_varlen
from lla_compile.tuner.errors import relative_error
from lla_compile.tuner.outcome import one_line

RIDGE = 1.0
PRECISION = "fast"
SEQUENCES = 8


@dataclass(frozen=True)
class Batch:
    """Sequences of ``lengths`` in ``num_heads`` heads of ``head_dim``; packed unless they are of one length."""

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
        """Standard normal query, key, value and gradient of the output (B, H, N, D); B is 1 if they are packed."""
        generator = torch.Generator(device).manual_seed(0)
        batch = len(self.lengths) if self.is_dense else 1
        shape = (4, batch, self.num_heads, sum(self.lengths) // batch, self.head_dim)
        return list(torch.randn(shape, generator=generator, device=device).to(getattr(torch, dtype)).unbind())

    def attention(self, device: torch.device) -> Peer:
        """Our own, every sequence to itself."""
        if self.is_dense:
            return launches.lla(RIDGE, PRECISION)
        ends = torch.tensor([0, *self.lengths]).cumsum(0).to(device, torch.int32)
        return Peer(
            lambda q, k, v: lla_attention_varlen(q, k, v, ends, ends, RIDGE, precision=PRECISION),
            to_own=lambda x: x[0].transpose(0, 1).contiguous(),
            from_own=lambda x: x.transpose(0, 1)[None],
        )


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
        timed: dict[str, Launch] = {}
        for prefix, x in (("", batch), ("dense_", dense)):
            attention = x.attention(target.device)
            *tensors, grad_out = x.inputs(dtype, target.device)
            timed[f"{prefix}forward"] = launches.forward(attention, tensors)
            timed[f"{prefix}training"] = launches.training(attention, tensors, grad_out)
        times, failures = time_all(timed, target, quick)
        row |= {f"{name}_ms": timing.median_ms for name, timing in times.items()}
        row |= {f"{name}_spread": timing.spread for name, timing in times.items()}
        if failures:
            return row | {"failure": next(iter(failures.values()))}
        row["pairs_over_dense"] = batch.visible_pairs / dense.visible_pairs
        for name in ("forward", "training"):
            time_over_dense = times[name].median_ms / times[f"dense_{name}"].median_ms
            row[f"{name}_over_dense"] = time_over_dense / row["pairs_over_dense"]
        row["difference"] = _difference(batch, dtype, target.device)
    except Exception as error:  # recorded as the row's failure; the other widths still run
        row["failure"] = one_line(error)
    return row


def _difference(batch: Batch, dtype: str, device: torch.device) -> float:
    """Largest relative difference of output and gradients of the shortest sequence from what it gives alone."""
    shortest = min(range(len(batch.lengths)), key=batch.lengths.__getitem__)
    start = sum(batch.lengths[:shortest])
    rows = slice(start, start + batch.lengths[shortest])
    inputs = batch.inputs(dtype, device)
    packed = _results(batch.attention(device), inputs)
    alone = _results(launches.lla(RIDGE, PRECISION), [x[:, :, rows] for x in inputs])
    return max(relative_error(x[:, :, rows], y) for x, y in zip(packed, alone))


def _results(attention: Peer, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of query, key and value."""
    *tensors, grad_out = inputs
    out = launches.forward(attention, tensors)()
    return [out, *launches.training(attention, tensors, grad_out)()]


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
