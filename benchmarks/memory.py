"""Peak memory that a forward pass takes beyond its inputs and its output, by length: linear, never quadratic."""

from __future__ import annotations

import argparse
import sys
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.problems import Shape
from benchmarks.report import Benchmark, Row, Target
from lla_compile import lla_attention, plan
from lla_compile.tuner.outcome import one_line


@torch.no_grad()
def run(options: argparse.Namespace, target: Target) -> list[Row]:
    if options.quick:
        shapes = [Shape(seqlen, 16, 2) for seqlen in (128, 256)]
    elif target.is_cuda:
        shapes = [Shape(seqlen, 64, 8) for seqlen in (1024, 4096, 16384, 65536)]
    else:
        shapes = [Shape(seqlen, 64, 2) for seqlen in (1024, 4096)]
    rows = []
    for shape in shapes:
        row = shape.as_row()
        rows.append(row)
        try:
            row |= measure(shape, options.dtype, target)
        except Exception as error:  # recorded as the row's failure; the others still run
            row["failure"] = one_line(error)
    return rows


def measure(shape: Shape, dtype: str, target: Target) -> Row:
    q, k, v = shape.inputs(dtype, target.device)
    chosen = plan(q, k, v)
    if target.is_cuda:
        lla_attention(q, k, v)  # compiles; what it loads stays
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = lla_attention(q, k, v)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes() as live:
            out = lla_attention(q, k, v)
        peak = live.peak
    extra, output = peak - out.nbytes, out.nbytes
    return {
        "extra_mib": extra / 2**20,
        "output_mib": output / 2**20,
        "extra_over_output": extra / output,
        "extra_bytes_a_query": extra / (shape.seqlen * shape.batch_heads),
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
        "seqlen", "head_dim", "batch_heads", "extra_mib", "output_mib", "extra_over_output", "extra_bytes_a_query",
        "backend", "schedule",
    ),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
