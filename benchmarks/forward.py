"""Time and error of lla_attention beside softmax attention and, where installed, FlashLLA and Parallax."""

from __future__ import annotations

import itertools
import sys
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks import comparison, launches, peers
from benchmarks.comparison import Op
from benchmarks.problems import Shape, executed_flops, last_rows_error, last_rows_reference
from benchmarks.report import Row, Target
from lla_compile import lla_attention, plan

SHAPES = {
    "peers": (
        Shape(1024, 64, 32),
        Shape(1024, 128, 32),
        Shape(4096, 64, 32),
        Shape(4096, 128, 32),
        Shape(16384, 64, 16),
    ),
    "small": (Shape(256, 32, 4), Shape(1024, 64, 4)),
    "tiny": (Shape(64, 16, 2),),
}
FLASHLLA_ITERATIONS = (32, 5)  # its default, and what it takes to be fast


@torch.no_grad()
def measure(shape: Shape, dtype: str, target: Target, quick: bool) -> list[Row]:
    """All rows of one shape."""
    tensors = shape.inputs(dtype, target.device)
    ops = comparison.standard_ops()
    if peers.available("flashlla"):
        for iterations, ridge in itertools.product(FLASHLLA_ITERATIONS, comparison.RIDGES):
            op = Op(f"flashlla, {iterations} iterations", ridge)
            ops[op] = partial(peers.flashlla, ridge, iterations, target.device)
    if peers.available("fla"):
        ops[Op("fla parallax")] = lambda: peers.parallax(tensors[0] / shape.head_dim)
    reference = cache(lambda ridge: last_rows_reference(*tensors, ridge))

    def details(op: Op, peer: peers.Peer, row: Row) -> Row:
        error = {"error": last_rows_error(launches.forward(peer, tensors)(), reference(op.ridge))}
        return error | _details(op, tensors, row["median_ms"]) if op.is_own else error

    passes = {"median_ms": lambda peer: launches.forward(peer, tensors)}
    return list(comparison.compare(shape, ops, passes, details, target, quick).values())


def _details(op: Op, tensors: tuple[Tensor, ...], median_ms: float) -> Row:
    """Iterations, rate and plan."""
    chosen = plan(*tensors, precision=op.precision)
    iterations = lla_attention(*tensors, op.ridge, precision=op.precision, return_info=True)[1].iterations
    return {
        "iterations_mean": iterations.double().mean().item(),
        "iterations_max": iterations.max().item(),
        "tflops": executed_flops(chosen, iterations) / (median_ms * 1e-3) / 1e12,
        "plan": chosen.config.as_dict(),
        "plan_source": chosen.source.value,
        "plan_distance": chosen.distance,
    }


BENCHMARK = comparison.comparison(
    name="forward",
    about=__doc__,
    shapes=SHAPES,
    measure=measure,
    columns=(
        "seqlen", "head_dim", "batch_heads", "op", "ridge", "precision", "median_ms", "spread", "time_over_sdpa",
        "iterations_mean", "iterations_max", "tflops", "error", "plan_source",
    ),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
