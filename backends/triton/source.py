"""Printing sweeps as Triton source. Needs no Triton: the text can be read, hashed and compared anywhere.

One kernel is printed for the `fused` schedule and one per sweep for `split`; both are the same pieces in another order:
the opening (which tile, which rows), the sweeps, and loads and stores of whatever crosses a launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lla_compile.expr import Expr, Kind, to_source
from lla_compile.sweeps import Loop, Sweep, SweepList, lower

_TEMPLATES = {
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
    "gt": "({0} > {1})",
    "lt": "({0} < {1})",
    "and": "({0} & {1})",
    "sqrt": "tl.sqrt({0})",
    "log2": "tl.log2({0})",
    "where": "tl.where({0}, {1}, {2})",
    "dot": "tl.sum({0} * {1}, axis=1)",
}

_HEADER = """\
import triton
import triton.language as tl

from lla_compile.backends.triton.primitives import (
    accumulate,
    key_segments,
    load_tile,
    program_tile,
    rounded,
    row_product,
    store_tile,
    visible,
)
"""

CONSTEXPRS = (
    "HEAD_DIM",
    "HEAD_DIM_V",
    "BLOCK_D",
    "BLOCK_DV",
    "BLOCK_Q",
    "BLOCK_K",
    "NUM_STAGES",
    "CAUSAL",
    "WINDOWED",
    "TERMS",
    "INPUT_PRECISION",
    "WEIGHT_SHIFT",
    "RIDGE_TENSOR",
    "SCALE_TENSOR",
    "RETURN_INFO",
)


@dataclass(frozen=True)
class Kernel:
    """A printed kernel.

    Attributes:
        name: of its function in the module.
        parameters: argument names in order, with Triton types ("*in" stands for a pointer to the input type).
        repeated: launched up to cg_max_iters times.
    """

    name: str
    parameters: tuple[tuple[str, str], ...]
    repeated: bool


@dataclass(frozen=True)
class Module:
    """Source text and the kernels in it, in order of launch."""

    text: str
    kernels: tuple[Kernel, ...]
    state: tuple[tuple[str, Kind], ...]


@lru_cache(maxsize=None)
def print_module(op: str, phase: str, schedule: str) -> Module:
    """The Triton module of an operator under a schedule."""
    program = lower(op, phase)
    if schedule == "fused":
        printed = [_print_kernel(program, f"{program.name}_fused", program.stages, crossing={})]
        state = ()
    else:
        crossing = program.state()
        printed = [
            _print_kernel(program, f"{program.name}_{_sweep(stage).name}", (stage,), crossing) for stage in program.stages
        ]
        state = tuple(crossing.items())
    text = "\n\n".join([_HEADER, *(text for _, text in printed)])
    return Module(text, tuple(kernel for kernel, _ in printed), state)


def _sweep(stage: Sweep | Loop) -> Sweep:
    return stage.sweep if isinstance(stage, Loop) else stage


class _Lines(list):
    """Source lines at a growing and shrinking indentation."""

    def __init__(self):
        super().__init__()
        self.depth = 0

    def add(self, text: str = "") -> None:
        self.extend(("    " * self.depth + line).rstrip() for line in text.splitlines() or [""])

    def open(self, text: str) -> None:
        self.add(text)
        self.depth += 1

    def close(self) -> None:
        self.depth -= 1


def _parameters(program: SweepList, crossing: dict[str, Kind]) -> list[tuple[str, str]]:
    inputs = (*program.row_inputs, *program.col_inputs)
    parameters = [(f"{name}_ptr", "*in") for name in (*inputs, *program.outputs)]
    parameters += [(f"{name}_ptr", "*i32" if name == "iterations" else "*fp32") for name in program.info]
    parameters += [(f"{name}_state", "*fp32") for name in crossing]
    for name in ("scale", *program.row_scalars):
        parameters += [(f"{name}_ptr", "*fp32"), (name, "fp32")]
    parameters += [(f"{name}_stride_{axis}", "i64") for name in program.row_scalars for axis in "bhn"]
    parameters += [(f"{name}_stride_{axis}", "i64") for name in inputs for axis in "bhn"]
    parameters += [(name, "fp32") for name in program.scalars]
    counts = ("cg_max_iters", "batch_heads", "num_heads", "group_size", "heads_per_group", "seqlen_q", "seqlen_k", "window")
    return parameters + [(name, "i32") for name in counts]


def _print_kernel(program: SweepList, name: str, stages: tuple, crossing: dict[str, Kind]) -> tuple[Kernel, str]:
    parameters = _parameters(program, crossing)
    out = _Lines()
    out.add("@triton.jit")
    out.open(f"def {name}(")
    for parameter, _ in parameters:
        out.add(f"{parameter},")
    for constant in CONSTEXPRS:
        out.add(f"{constant}: tl.constexpr,")
    out.close()
    out.open("):")
    _print_opening(out, program)
    for stage in stages:
        sweep = _sweep(stage)
        out.add()
        out.add(f"# {sweep.name}")
        if crossing:
            _print_split_sweep(out, program, stage, crossing)
        elif isinstance(stage, Loop):
            out.add("turn = 0")
            out.add(f"going = tl.max({stage.active}, axis=0) > 0")
            out.open("while going:")
            _print_sweep(out, program, sweep)
            out.add("turn += 1")
            out.add(f"going = (turn < cg_max_iters) & (tl.max({stage.active}, axis=0) > 0)")
            out.close()
        else:
            _print_sweep(out, program, sweep)
    written = set().union(*(_sweep(s).writes() for s in stages))
    out.add()
    for name_ in program.outputs:
        if name_ in written:
            out.add(
                f"store_tile({name_}_ptr + first_row * HEAD_DIM_V, {name_}, start_m, seqlen_q, HEAD_DIM_V, "
                f"HEAD_DIM_V, BLOCK_Q, BLOCK_DV)"
            )
    if stages[-1] is program.stages[-1]:
        _print_info(out, program, missing={n: k for n, k in crossing.items() if n not in written})
    return Kernel(name, tuple(parameters), isinstance(stages[0], Loop)), "\n".join(out) + "\n"


def _print_split_sweep(out: _Lines, program: SweepList, stage: Sweep | Loop, crossing: dict[str, Kind]) -> None:
    """A sweep between loading its state and storing it; what only the epilogue reads is loaded after the stream."""
    sweep = _sweep(stage)
    early = [name for name in crossing if name in sweep.stream_reads()]
    if isinstance(stage, Loop):
        _print_state_load(out, stage.active, crossing[stage.active])
        out.open(f"if tl.max({stage.active}, axis=0) == 0:")
        out.add("return")
        out.close()
    for name in early:
        _print_state_load(out, name, crossing[name])
    _print_stream(out, program, sweep)
    for name in crossing:
        if name in sweep.reads() and name not in early and not (isinstance(stage, Loop) and name == stage.active):
            _print_state_load(out, name, crossing[name])
    _print_epilogue(out, program, sweep)
    for name, kind in crossing.items():
        if name in sweep.writes():
            _print_state_store(out, name, kind)


def _print_opening(out: _Lines, program: SweepList) -> None:
    out.add(
        """\
num_tiles = tl.cdiv(seqlen_q, BLOCK_Q)
bh, tile = program_tile(tl.program_id(0), num_tiles, batch_heads, heads_per_group, CAUSAL)
b = (bh // num_heads).to(tl.int64)
h = (bh % num_heads).to(tl.int64)
start_m = tile * BLOCK_Q
offs_m = start_m + tl.arange(0, BLOCK_Q)
row_valid = offs_m < seqlen_q
first_row = bh.to(tl.int64) * seqlen_q
start, full_start, full_stop, stop = key_segments(
    start_m, seqlen_q, seqlen_k, window, BLOCK_Q, BLOCK_K, CAUSAL, WINDOWED
)
scale_log2 = scale * 1.4426950408889634
if SCALE_TENSOR:
    scale_log2 = tl.load(scale_ptr) * 1.4426950408889634"""
    )
    for name in program.row_scalars:
        strides = [f"{name}_stride_{axis}" for axis in "bhn"]
        out.add(f"{name}_rows = tl.full([BLOCK_Q], 1.0, tl.float32) * {name}")
        out.open(f"if {name.upper()}_TENSOR:")
        out.add(f"{name}_pointers = {name}_ptr + b * {strides[0]} + h * {strides[1]} + offs_m.to(tl.int64) * {strides[2]}")
        out.add(f"{name}_rows = tl.load({name}_pointers, mask=row_valid, other=1.0)")
        out.close()
    for name in program.row_inputs:
        out.add(f"{name}_base = {name}_ptr + b * {name}_stride_b + h * {name}_stride_h")
        out.add(
            f"{name} = load_tile({name}_base, start_m, seqlen_q, {name}_stride_n, HEAD_DIM, BLOCK_Q, BLOCK_D, True)"
        )
    for name in program.col_inputs:
        out.add(f"{name}_base = {name}_ptr + b * {name}_stride_b + (h // group_size) * {name}_stride_h")


def _width(column: str) -> tuple[str, str]:
    """Constexpr names of a key-side operand's width and padded width."""
    return ("HEAD_DIM_V", "BLOCK_DV") if column == "v" else ("HEAD_DIM", "BLOCK_D")


def _text(program: SweepList, expr: Expr) -> str:
    names = {name: f"{name}.to(tl.float32)" for name in program.row_inputs}
    names |= {name: f"{name}_rows" for name in program.row_scalars}
    return to_source(expr, _TEMPLATES, names=names)


def _print_sweep(out: _Lines, program: SweepList, sweep: Sweep) -> None:
    _print_stream(out, program, sweep)
    _print_epilogue(out, program, sweep)


def _print_stream(out: _Lines, program: SweepList, sweep: Sweep) -> None:
    online = sweep.softmax == "online"

    for assign in sweep.prologue:
        out.add(f"{assign.name} = {_text(program, assign.value)}")
    for score in sweep.scores:
        used = f"{score.row}.to(tl.float32)"
        if score.row not in program.row_inputs:
            used = f"{score.row}_used"
            out.add(f"{score.row}_high = rounded({score.row}, k_ptr.dtype.element_ty)")
            out.add(f"{score.row}_used = {score.row}_high.to(tl.float32)")
            out.add(f"{score.row}_low = {score.row}_high")
            out.open("if TERMS == 2:")
            out.add(f"{score.row}_low = ({score.row} - {score.row}_used).to(k_ptr.dtype.element_ty)")
            out.add(f"{score.row}_used += {score.row}_low.to(tl.float32)")
            out.close()
        if score.center:
            out.add(f"{score.name}_center = tl.sum({used} * {score.center}, axis=1)")
    if online:
        out.add('row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)')
        out.add("row_sum = tl.zeros([BLOCK_Q], tl.float32)")
    else:
        out.add("lse_shifted = lse - WEIGHT_SHIFT")
    for accumulator in sweep.accumulators:
        out.add(f"{accumulator.name} = tl.zeros([BLOCK_Q, {_width(accumulator.col)[1]}], tl.float32)")

    # Segment 0 ends where a window's edge does, 1 needs no mask, 2 holds the diagonal and the last keys.
    out.open("for segment in tl.static_range(0 if WINDOWED else 1, 3):")
    out.add("first_n = start if segment == 0 else (full_start if segment == 1 else full_stop)")
    out.add("last_n = full_start if segment == 0 else (full_stop if segment == 1 else stop)")
    out.open("for start_n in tl.range(first_n, last_n, BLOCK_K, num_stages=1 if segment != 1 else NUM_STAGES):")
    for column in dict.fromkeys([s.col for s in sweep.scores] + [a.col for a in sweep.accumulators]):
        width, block = _width(column)
        out.add(
            f"{column} = load_tile({column}_base, start_n, seqlen_k, {column}_stride_n, {width}, BLOCK_K, {block}, segment != 1)"
        )
    for position, score in enumerate(sweep.scores):
        if score.row in program.row_inputs:
            product = f"row_product({score.row}, {score.row}, {score.col}, 1, INPUT_PRECISION)"
        else:
            product = f"row_product({score.row}_high, {score.row}_low, {score.col}, TERMS, INPUT_PRECISION)"
        if score.center:
            product += f" - {score.name}_center[:, None]"
        out.add(f"{score.name} = {product}" + (" * scale_log2" if position == 0 else ""))
        if position == 0:
            _print_weights(out, score.name, online, sweep)
    for accumulator in sweep.accumulators:
        out.add(
            f"{accumulator.name} = accumulate("
            f"{accumulator.name}, {_text(program, accumulator.weight)}, {accumulator.col}, TERMS, INPUT_PRECISION)"
        )
    out.close()
    out.close()


def _print_epilogue(out: _Lines, program: SweepList, sweep: Sweep) -> None:
    if sweep.softmax == "online":
        out.add("row_sum = tl.where(row_valid, row_sum, 0.0)")
    else:
        for accumulator in sweep.accumulators:
            out.open("if WEIGHT_SHIFT != 0:")
            out.add(f"{accumulator.name} *= 1.0 / (1 << WEIGHT_SHIFT)")
            out.close()
    for assign in sweep.epilogue:
        out.add(f"{assign.name} = {_text(program, assign.value)}")


def _print_weights(out: _Lines, score: str, online: bool, sweep: Sweep) -> None:
    out.open("if segment != 1:")
    mask = "visible(offs_m, start_n, seqlen_q, seqlen_k, window, BLOCK_K, CAUSAL, WINDOWED)"
    out.add(f'{score} = tl.where({mask}, {score}, float("-inf"))')
    out.close()
    if not online:
        out.add(f"p = tl.exp2({score} - lse_shifted[:, None])")
        return
    out.add(f"new_max = tl.maximum(row_max, tl.max({score}, axis=1))")
    out.add("finite_max = new_max")
    out.open("if segment != 1:")
    out.add('finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)')
    out.close()
    out.add(f"p = tl.exp2({score} - finite_max[:, None])")
    out.add("rescale = tl.exp2(row_max - finite_max)")
    out.add("row_sum = row_sum * rescale + tl.sum(p, axis=1)")
    for accumulator in sweep.accumulators:
        out.add(f"{accumulator.name} *= rescale[:, None]")
    out.add("row_max = new_max")


def _print_state_load(out: _Lines, name: str, kind: Kind) -> None:
    if kind is Kind.ROW:
        out.add(f"{name} = tl.load({name}_state + first_row + offs_m, mask=row_valid, other=0.0)")
    else:
        out.add(
            f"{name} = load_tile("
            f"{name}_state + first_row * HEAD_DIM, start_m, seqlen_q, HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D, True)"
        )


def _print_state_store(out: _Lines, name: str, kind: Kind) -> None:
    if kind is Kind.ROW:
        out.add(f"tl.store({name}_state + first_row + offs_m, {name}, mask=row_valid)")
    else:
        out.add(
            f"store_tile("
            f"{name}_state + first_row * HEAD_DIM, {name}, start_m, seqlen_q, HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D)"
        )


def _print_info(out: _Lines, program: SweepList, missing: dict[str, Kind]) -> None:
    """Diagnosis, by the last kernel: its values are final there."""
    out.open("if RETURN_INFO:")
    for name in program.info:
        if name in missing:
            _print_state_load(out, name, missing[name])
        out.add(f"tl.store({name}_ptr + first_row + offs_m, {name}.to({name}_ptr.dtype.element_ty), mask=row_valid)")
    out.close()
