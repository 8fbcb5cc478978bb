"""Peak memory of a forward pass, alone and with the backward pass, beyond inputs and results, by length."""

from __future__ import annotations

import argparse
import itertools
import sys
import weakref
from typing import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.problems import Shape
from benchmarks.report import Benchmark, Row, Target
from lla_compile import lla_attention, plan
from lla_compile.tuner.outcome import one_line


def run(options: argparse.Namespace, target: Target) -> list[Row]:
    if options.quick:
        shapes = [Shape(seqlen, 16, 2) for seqlen in (128, 256)]
    elif target.is_cuda:
        shapes = [Shape(seqlen, 64, 8) for seqlen in (1024, 4096, 16384, 65536)]
    else:
        shapes = [Shape(seqlen, 64, 2) for seqlen in (1024, 4096)]
    rows = []
    for (name, step), shape in itertools.product(STEPS.items(), shapes):
        row = {**shape.as_row(), "passes": name}
        rows.append(row)
        try:
            row |= measure(step, shape, options.dtype, target)
        except Exception as error:  # recorded as the row's failure; the others still run
            row["failure"] = one_line(error)
    return rows


@torch.no_grad()
def forward(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> tuple[Tensor, ...]:
    """The output."""
    return (lla_attention(q, k, v),)


def training(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = lla_attention(*leaves)
    return out, *torch.autograd.grad(out, leaves, grad_out)


STEPS = {"forward": forward, "forward + backward": training}


def measure(step: Callable[..., tuple[Tensor, ...]], shape: Shape, dtype: str, target: Target) -> Row:
    tensors = shape.training_inputs(dtype, target.device)
    if target.is_cuda:
        step(*tensors)  # compiles; what it loads stays
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = step(*tensors)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes() as live:
            results = step(*tensors)
        peak = live.peak
    returned = sum(x.nbytes for x in results)
    chosen = plan(*tensors[:3], phase="forward" if len(results) == 1 else "backward")
    return {
        "extra_mib": (peak - returned) / 2**20,
        "output_mib": results[0].nbytes / 2**20,
        "extra_over_output": (peak - returned) / results[0].nbytes,
        "extra_bytes_a_query": (peak - returned) / (shape.seqlen * shape.batch_heads),
        "backend": chosen.config.backend,
        "schedule": chosen.config.schedule,
    }


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations return, while they live: a CPU's allocator keeps no such record."""

    def __init__(self):
        super().__init__()
        self.peak = self._now = 0
        self._storages: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self._add(x.untyped_storage(), known)
        return result

    def _add(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        address = storage.data_ptr()
        if address in known or address in self._storages:
            return
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        self._storages[address] = weakref.finalize(storage, self._drop, address, storage.nbytes())

    def _drop(self, address: int, nbytes: int) -> None:
        del self._storages[address]
        self._now -= nbytes


BENCHMARK = Benchmark(
    name="memory",
    about=__doc__,
    run=run,
    columns=(
        "passes", "seqlen", "head_dim", "batch_heads", "extra_mib", "output_mib", "extra_over_output",
        "extra_bytes_a_query", "backend", "schedule",
    ),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
