"""Parallax beside that of flash-linear-attention, where it is installed, and softmax attention: times and errors."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import launches, peers
from benchmarks.peers import Peer
from benchmarks.problems import Shape
from benchmarks.report import Benchmark, Row, Target
from benchmarks.timing import Launch, time_all
from lla_compile import LLASpec, parallax_attention, parallax_decode, parallax_decode_workspace, plan
from lla_compile.reference import parallax_reference, parallax_reference_backward
from lla_compile.tuner.errors import relative_error
from lla_compile.tuner.outcome import one_line
from lla_compile.tuner.problem import normal_tensors

SHAPES = {
    "peers": (Shape(4096, 64, 32), Shape(4096, 128, 32), Shape(16384, 64, 16), Shape(16384, 128, 16)),
    "small": (Shape(256, 32, 4), Shape(512, 64, 4)),
    "tiny": (Shape(64, 16, 2),),
}
# (batch, heads, keys, head_dim) of one new token.
CACHES = {
    "peers": ((1, 8, 4096, 128), (1, 8, 16384, 128), (32, 8, 4096, 128), (32, 8, 16384, 128)),
    "small": ((2, 4, 1024, 64),),
    "tiny": ((1, 2, 128, 16),),
}
# Rows of a head that are held against the reference, which costs their square.
REFERENCE_ROWS = 1024
GRADIENTS = ("dq", "dr", "dk", "dv")


def attentions(tensors: list[Tensor]) -> dict[str, tuple[Peer, list[Tensor]]]:
    """Each attention by name with those of q, r, k and v that it takes."""
    q, _, k, v = tensors
    found = {"sdpa": (peers.sdpa(), [q, k, v]), "parallax_attention": (Peer(parallax_attention), tensors)}
    if peers.available("fla"):
        found["fla parallax"] = peers.fla_parallax(), tensors
    return found


def measure(shape: Shape, dtype: str, target: Target, quick: bool) -> list[Row]:
    """All rows of one shape."""
    spec = shape.spec(dtype, op="parallax", phase="backward")
    named = normal_tensors(spec, target.device, "benchmark")
    tensors, grad_out = [named[name] for name in "qrkv"], named["grad_out"]
    rows: dict[str, Row] = {}
    timed: dict[tuple[str, str], Launch] = {}
    for name, (peer, own) in attentions(tensors).items():
        rows[name] = {**shape.as_row(), "op": name}
        with torch.no_grad():
            timed[name, "forward_ms"] = launches.forward(peer, own)
        timed[name, "training_ms"] = launches.training(peer, own, grad_out)
    times, failures = time_all(timed, target, quick)
    for name, (peer, _) in attentions(tensors).items():
        row, columns = rows[name], ("forward_ms", "training_ms")
        if failed := [failures[name, column] for column in columns if (name, column) in failures]:
            row["failure"] = failed[0]
            continue
        row |= {column: times[name, column].median_ms for column in columns}
        row["spread"] = max(times[name, column].spread for column in columns)
        try:
            row |= {} if name == "sdpa" else _errors(peer, tensors, grad_out)
        except Exception as error:  # recorded as the row's failure; the others still run
            row["failure"] = one_line(error)
    own, fla = rows["parallax_attention"], rows.get("fla parallax", {})
    for column, phase in (("forward_ms", "forward"), ("training_ms", "backward")):
        if column in own and column in fla:
            own[f"fla_over_this_{column.removesuffix('_ms')}"] = fla[column] / own[column]
        chosen = plan(replace(spec, phase=phase), device=target.info)
        own |= {f"{phase}_plan": chosen.config.as_dict(), f"{phase}_plan_source": chosen.source.value}
    return list(rows.values())


def _errors(peer: Peer, tensors: list[Tensor], grad_out: Tensor) -> Row:
    """Of every head's first rows: what follows them changes nothing in a causal problem."""
    first = [x[:, :, :REFERENCE_ROWS] for x in (grad_out, *tensors)]
    only = torch.zeros_like(grad_out)
    only[:, :, :REFERENCE_ROWS] = first[0]
    with torch.no_grad():
        out = launches.forward(peer, tensors)()[:, :, :REFERENCE_ROWS]
    row: Row = {"error": relative_error(out, parallax_reference(*first[1:]))}
    reference = parallax_reference_backward(*first)
    for name, gradient in zip(GRADIENTS, launches.training(peer, tensors, only)()):
        row[f"error_{name}"] = relative_error(gradient[:, :, :REFERENCE_ROWS], reference[name])
    return row


def measure_cache(sizes: tuple[int, int, int, int], dtype: str, target: Target, quick: bool) -> list[Row]:
    """One new token over a full cache, launched as a server does: output and workspace given."""
    batch, heads, keys, head_dim = sizes
    spec = LLASpec(dtype, head_dim, head_dim, batch, heads, heads, 1, keys, op="parallax", phase="decode")
    q, k, v, r = normal_tensors(spec, target.device, "benchmark").values()
    out, workspace = torch.empty_like(q), parallax_decode_workspace(q, k, v)
    steps = {
        "sdpa": lambda: scaled_dot_product_attention(q, k, v),
        "parallax_decode": lambda: parallax_decode(q, r, k, v, out=out, workspace=workspace),
    }
    with torch.no_grad():
        times, failures = time_all(steps, target, quick)
    chosen = plan(spec, device=target.info)
    rows = []
    for name in steps:
        row: Row = {"seqlen": keys, "head_dim": head_dim, "batch_heads": batch * heads, "op": name}
        if name in failures:
            rows.append(row | {"failure": failures[name]})
            continue
        row |= {"decode_ms": times[name].median_ms, "spread": times[name].spread}
        if target.info.bandwidth_gbs:
            row["floor_ms"] = chosen.cache_bytes / target.info.bandwidth_gbs / 1e6
        if name != "sdpa":
            expected = parallax_reference(*(x[:1, :1] for x in (q, r, k, v)))
            row |= {"error": relative_error(out[:1, :1], expected), "decode_plan": chosen.config.as_dict()}
            if "sdpa" in times:
                row["time_over_sdpa"] = times[name].median_ms / times["sdpa"].median_ms
        rows.append(row)
    return rows


def run(options: argparse.Namespace, target: Target) -> list[Row]:
    if options.shapes is None:
        options.shapes = "tiny" if options.quick else "peers" if target.is_cuda else "small"
    rows: list[Row] = []
    for shape in SHAPES[options.shapes]:
        rows += measure(shape, options.dtype, target, options.quick)
    for sizes in CACHES[options.shapes]:
        rows += measure_cache(sizes, options.dtype, target, options.quick)
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    default = "peers on a GPU, small on a CPU, tiny with --quick"
    parser.add_argument("--shapes", choices=SHAPES, help=f"default: {default}")


BENCHMARK = Benchmark(
    name="parallax",
    about=__doc__,
    run=run,
    columns=(
        "seqlen", "head_dim", "batch_heads", "op", "forward_ms", "training_ms", "decode_ms", "fla_over_this_forward",
        "fla_over_this_training", "time_over_sdpa", "error", *(f"error_{name}" for name in GRADIENTS),
    ),
    add_options=add_options,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
