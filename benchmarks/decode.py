"""Time of a decoding step over a KV cache beside softmax attention, and its error against float64 at any length."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from dataclasses import dataclass, replace
from typing import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import comparison
from benchmarks.comparison import SDPA, Op
from benchmarks.peers import Peer
from benchmarks.report import Benchmark, Row, Target
from benchmarks.timing import Launch
from lla_compile import backends, lla_decode, lla_decode_workspace, plan
from lla_compile.plans import Plan, Source
from lla_compile.spec import PRECISIONS, LLASpec
from lla_compile.tuner.compile_pool import CompilePool, worker_count
from lla_compile.tuner.held_out import HeldOut
from lla_compile.tuner.outcome import one_line
from lla_compile.tuner.problem import normal_tensors

RIDGE = 1.0
ERROR_RIDGES = (1.0, 0.1, 0.01)
ERROR_DTYPES = ("bfloat16", "float16")
ERROR_HEADS = 4
LENGTHS = (1, 2, 7, 33, 64, 100, 127, 128, 200, 256, 500, 1024, 4096)
SPLITS = (1, 7, 64)  # beside the planned number
_COMPILE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Cache:
    """One new token for each of ``batch_heads`` query heads, ``group`` of which share ``seqlen`` keys."""

    batch_heads: int
    seqlen: int
    head_dim: int
    group: int = 1

    def spec(self, dtype: str, precision: str = "accurate") -> LLASpec:
        sizes = self.head_dim, self.seqlen, self.batch_heads
        return LLASpec.decoding(dtype, *sizes, group_size=self.group, precision=precision)

    def inputs(self, dtype: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Standard normal query (B, G, 1, D), keys and values (B, 1, M, D), the same in every run."""
        return tuple(normal_tensors(self.spec(dtype), device, "benchmark").values())

    def as_row(self) -> Row:
        sizes = {"seqlen": self.seqlen, "head_dim": self.head_dim, "batch_heads": self.batch_heads}
        return {"part": "time", **sizes, "group": self.group}


def _grouped(batch_heads: int, seqlen: int, head_dim: int, groups: Sequence[int] = (1,)) -> tuple[Cache, ...]:
    return tuple(Cache(batch_heads, seqlen, head_dim, group) for group in groups)


CACHES = {
    "gpu": (
        *_grouped(256, 16384, 128, (1, 4, 8)),
        *_grouped(256, 16384, 64),
        *_grouped(8, 16384, 128, (1, 4, 8)),
        *_grouped(8, 16384, 64),
        *_grouped(32, 4096, 128, (1, 4)),
        *_grouped(512, 1024, 128),
        *_grouped(8, 65536, 128, (1, 8)),
    ),
    "cpu": (*_grouped(8, 1024, 64, (1, 4)), *_grouped(8, 4096, 64)),
    "quick": _grouped(4, 64, 16, (1, 2)),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--graph", action="store_true", help="also time replays of a CUDA graph that holds one step")


@torch.no_grad()
def run(options: argparse.Namespace, target: Target) -> list[Row]:
    if options.graph and not target.is_cuda:
        raise ValueError("--graph needs a GPU")
    caches = CACHES["quick" if options.quick else "gpu" if target.is_cuda else "cpu"]
    lengths, head_dims = (LENGTHS[:5], (16,)) if options.quick else (LENGTHS, (64, 128))
    cases = {case: _plans(case.spec, target) for case in _error_cases(lengths, head_dims, target)}
    timed = itertools.product(caches, PRECISIONS)
    plans = [plan(cache.spec(options.dtype, precision), device=target.info) for cache, precision in timed]
    if target.is_cuda:
        _compile([*plans, *itertools.chain.from_iterable(cases.values())], target)
    rows: list[Row] = []
    for cache in caches:
        rows += measure(cache, options, target)
    for case, plans in cases.items():
        rows += [_errors(case, plans, ridge) for ridge in ERROR_RIDGES]
    return rows


def measure(cache: Cache, options: argparse.Namespace, target: Target) -> list[Row]:
    """The times of one cache."""
    tensors = cache.inputs(options.dtype, target.device)
    ops: comparison.Ops = {SDPA: lambda: _sdpa(cache.group)}
    for precision in PRECISIONS:
        ops[Op("lla_decode", RIDGE, precision)] = lambda precision=precision: _lla(tensors, precision)
    passes = {"graph_ms": lambda peer: _replay(peer, tensors)} if options.graph else {}
    passes["median_ms"] = lambda peer: lambda: peer.attend(*tensors)

    def details(op: Op, peer: Peer, row: Row) -> Row:
        chosen = plan(*tensors, precision=op.precision, phase="decode")
        return {"plan": chosen.config.as_dict(), "plan_source": chosen.source.value, "plan_distance": chosen.distance}

    rows = comparison.compare(cache, ops, passes, details, target, options.quick)
    _, k, v = tensors
    for row in rows.values():
        row |= {"dtype": options.dtype, "cache_bytes": k.nbytes + v.nbytes}
        if target.info.bandwidth_gbs:
            row["floor_ms"] = row["cache_bytes"] / (target.info.bandwidth_gbs * 1e6)
        if "median_ms" in row:
            row["gb_per_s"] = row["cache_bytes"] / (row["median_ms"] * 1e6)
        if "graph_ms" in row and "graph_ms" in rows[SDPA]:
            row["graph_over_sdpa"] = row["graph_ms"] / rows[SDPA]["graph_ms"]
    return list(rows.values())


def _sdpa(group: int) -> Peer:
    return Peer(lambda q, k, v: scaled_dot_product_attention(q, k, v, enable_gqa=group > 1))


def _lla(tensors: tuple[Tensor, Tensor, Tensor], precision: str) -> Peer:
    """Our own, as a server calls it: output and workspace are made once."""
    q, _, v = tensors
    given = {"out": q.new_empty((*q.shape[:3], v.shape[3]))}
    given["workspace"] = lla_decode_workspace(*tensors, precision=precision)
    return Peer(lambda q, k, v: lla_decode(q, k, v, RIDGE, precision=precision, **given))


def _replay(peer: Peer, tensors: tuple[Tensor, Tensor, Tensor]) -> Launch:
    """A CUDA graph that holds one call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        peer.attend(*tensors)  # compiles, which a capture cannot
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        peer.attend(*tensors)
    return graph.replay


def _error_cases(lengths: tuple[int, ...], head_dims: tuple[int, ...], target: Target) -> list[HeldOut]:
    """Caches with a sequence of each length, NaN in the slots that it leaves."""

    def case(dtype: str, head_dim: int, precision: str) -> HeldOut:
        spec = LLASpec(dtype, head_dim, head_dim, precision=precision, **sizes)
        return HeldOut(spec, target.device, "benchmark", seqlens=lengths)

    sizes = {"batch": len(lengths), "num_heads": ERROR_HEADS, "num_kv_heads": ERROR_HEADS}
    sizes |= {"seqlen_q": 1, "seqlen_k": max(lengths), "phase": "decode"}
    return list(itertools.starmap(case, itertools.product(ERROR_DTYPES, head_dims, PRECISIONS)))


def _plans(spec: LLASpec, target: Target) -> list[Plan]:
    """The plan of a call, and where it is `gram` the same with other numbers of splits."""
    planned = plan(spec, device=target.info)
    config, backend = planned.config, backends.get(planned.config.backend)
    if config.schedule != "gram":
        return [planned]
    others = [replace(config, num_splits=splits) for splits in SPLITS if splits != config.num_splits]
    return [planned] + [
        Plan(spec, target.info, other, Source.REQUESTED, 0.0, "a benchmark")
        for other in others
        if backend.infeasible(spec, other, target.info) is None
    ]


def _errors(case: HeldOut, plans: list[Plan], ridge: float) -> Row:
    """Errors by number of splits and by length, each sequence relative to its own reference, and the worst of them."""
    spec, errors = case.spec, {}
    row: Row = {
        "part": "error", "head_dim": spec.head_dim, "dtype": spec.dtype, "op": "lla_decode", "ridge": ridge,
        "precision": spec.precision, "schedule": plans[0].config.schedule, "errors": errors,
    }  # fmt: skip
    try:
        for chosen in plans:
            outputs = backends.get(chosen.config.backend).bind(chosen)(case.inputs(ridge), ("out",))
            found = dict(zip(case.seqlens, case.errors(outputs, ridge).values()))
            errors[chosen.config.num_splits or 1] = found
    except Exception as error:  # recorded as the row's failure; the others still run
        return row | {"failure": one_line(error)}
    # One that is not finite is the worst.
    by_size = {(splits, keys): error for splits, found in errors.items() for keys, error in found.items()}
    splits, keys = max(by_size, key=lambda at: by_size[at] if math.isfinite(by_size[at]) else math.inf)
    return row | {
        "error": by_size[splits, keys],
        "error_limit": case.limit(ridge),
        "worst_keys": keys,
        "worst_splits": splits,
    }


def _compile(plans: Iterable[Plan], target: Target) -> None:
    """Fill the compiler's cache in parallel; what fails says so when it is launched."""
    tasks = dict.fromkeys(((chosen.spec,), chosen.config) for chosen in plans)
    with CompilePool(target.info, worker_count(), _COMPILE_TIMEOUT_S) as pool:
        for task in tasks:
            pool.submit(task)
        for task in tasks:
            pool.result(task)


BENCHMARK = Benchmark(
    name="decode",
    about=__doc__,
    run=run,
    columns=(
        "seqlen", "head_dim", "batch_heads", "group", "dtype", "op", "precision", "ridge", "median_ms",
        "time_over_sdpa", "graph_over_sdpa", "gb_per_s", "floor_ms", "error", "worst_keys", "worst_splits",
    ),
    add_options=add_options,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
