"""Printing sweeps as Triton kernels. Needs no Triton: the text can be read, hashed and compared anywhere.

One kernel is printed for the `fused` schedule and one per sweep for `split`; both are the same pieces in another order:
the opening (which tile, which rows), the sweeps, and loads and stores of whatever crosses a launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lla_compile.backends.triton.sweep_source import Lines, SweepPrinter
from lla_compile.expr import Kind
from lla_compile.sweeps import Loop, Sweep, SweepList, lower

_HEADER = """\
import triton
import triton.language as tl

from lla_compile.backends.triton.primitives import (
    accumulate,
    joined,
    key_segments,
    load_tile,
    low_term,
    program_tile,
    representable,
    rounded,
    row_product,
    store_tile,
    visible,
    wide_dot,
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
    "WIDE",
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
    """Source text and what it needs at run time.

    Attributes:
        text: the source.
        kernels: in order of launch.
        state: what crosses launches in float32, with kinds.
        rounded_state: vectors that cross launches in the input type, as a high and a low term each.
    """

    text: str
    kernels: tuple[Kernel, ...]
    state: tuple[tuple[str, Kind], ...] = ()
    rounded_state: tuple[str, ...] = ()


@lru_cache(maxsize=None)
def print_module(op: str, phase: str, schedule: str) -> Module:
    """The Triton module of an operator under a schedule."""
    program = lower(op, phase)
    if schedule == "fused":
        text, kernel = _KernelPrinter(program, {}).print(f"{program.name}_fused", program.stages)
        return Module(f"{_HEADER}\n\n{text}", (kernel,))
    crossing = program.state()
    printed = [
        _KernelPrinter(program, crossing).print(f"{program.name}_{_sweep(stage).name}", (stage,))
        for stage in program.stages
    ]
    return Module(
        text="\n\n".join([_HEADER, *(text for text, _ in printed)]),
        kernels=tuple(kernel for _, kernel in printed),
        state=tuple((name, kind) for name, kind in crossing.items() if name not in program.rounded()),
        rounded_state=tuple(name for name in crossing if name in program.rounded()),
    )


def _sweep(stage: Sweep | Loop) -> Sweep:
    return stage.sweep if isinstance(stage, Loop) else stage


class _KernelPrinter:
    """One kernel: ``crossing`` is the state that lives in memory because other launches share it."""

    def __init__(self, program: SweepList, crossing: dict[str, Kind]):
        self.program = program
        self.crossing = crossing
        self.out = Lines()
        self.sweeps = SweepPrinter(self.out, program)

    def print(self, name: str, stages: tuple) -> tuple[str, Kernel]:
        out, program = self.out, self.program
        parameters = self._parameters()
        out.add("@triton.jit")
        out.open(f"def {name}(")
        for parameter, _ in parameters:
            out.add(f"{parameter},")
        for constant in CONSTEXPRS:
            out.add(f"{constant}: tl.constexpr,")
        out.close()
        out.open("):")
        self._opening()
        for stage in stages:
            out.add()
            out.add(f"# {_sweep(stage).name}")
            if self.crossing:
                self._split_stage(stage)
            else:
                self._fused_stage(stage)
        out.add()
        written = set().union(*(_sweep(stage).writes() for stage in stages))
        for output in program.outputs:
            if output in written:
                out.add(
                    f"store_tile({output}_ptr + first_row * HEAD_DIM_V, {output}, start_m, seqlen_q, HEAD_DIM_V, "
                    f"HEAD_DIM_V, BLOCK_Q, BLOCK_DV)"
                )
        if stages[-1] is program.stages[-1]:
            self._info(missing=[info for info in program.info if info not in written])
        return "\n".join(out) + "\n", Kernel(name, tuple(parameters), isinstance(stages[0], Loop))

    def _parameters(self) -> list[tuple[str, str]]:
        program = self.program
        inputs = (*program.row_inputs, *program.col_inputs)
        parameters = [(f"{name}_ptr", "*in") for name in (*inputs, *program.outputs)]
        parameters += [(f"{name}_ptr", "*i32" if name == "iterations" else "*fp32") for name in program.info]
        rounded = [name for name in self.crossing if name in program.rounded()]
        parameters += [(f"{name}_state", "*fp32") for name in self.crossing if name not in rounded]
        parameters += [(f"{name}_{term}_state", "*in") for name in rounded for term in ("high", "low")]
        for name in ("scale", *program.row_scalars):
            parameters += [(f"{name}_ptr", "*fp32"), (name, "fp32")]
        for name in (*program.row_scalars, *inputs):
            parameters += [(f"{name}_stride_{axis}", "i64") for axis in "bhn"]
        parameters += [(name, "fp32") for name in program.scalars]
        counts = ("cg_max_iters", "batch_heads", "num_heads", "group_size", "heads_per_group")
        return parameters + [(name, "i32") for name in (*counts, "seqlen_q", "seqlen_k", "window")]

    def _opening(self) -> None:
        """Which head and query tile this program has, and its rows' inputs."""
        out, program = self.out, self.program
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
            out.add(f"{name}_rows = tl.full([BLOCK_Q], 1.0, tl.float32) * {name}")
            out.open(f"if {name.upper()}_TENSOR:")
            out.add(f"{name}_base = {name}_ptr + b * {name}_stride_b + h * {name}_stride_h")
            out.add(f"{name}_rows = tl.load({name}_base + offs_m * {name}_stride_n, mask=row_valid, other=1.0)")
            out.close()
        for name in program.row_inputs:
            out.add(f"{name}_base = {name}_ptr + b * {name}_stride_b + h * {name}_stride_h")
            self._load_rows(name, f"{name}_base", f"{name}_stride_n")
        for name in program.col_inputs:
            out.add(f"{name}_base = {name}_ptr + b * {name}_stride_b + (h // group_size) * {name}_stride_h")

    def _fused_stage(self, stage: Sweep | Loop) -> None:
        out, sweep = self.out, _sweep(stage)
        if not isinstance(stage, Loop):
            self._whole_sweep(sweep)
            return
        out.add("turn = 0")
        out.add(f"going = tl.max({stage.active}, axis=0) > 0")
        out.open("while going:")
        self._whole_sweep(sweep)
        out.add("turn += 1")
        out.add(f"going = (turn < cg_max_iters) & (tl.max({stage.active}, axis=0) > 0)")
        out.close()

    def _whole_sweep(self, sweep: Sweep) -> None:
        self.sweeps.prologue(sweep)
        self.sweeps.stream(sweep)
        self.sweeps.epilogue(sweep)

    def _split_stage(self, stage: Sweep | Loop) -> None:
        """A sweep between loading its state and storing it; what only the epilogue reads is loaded after the stream."""
        out, sweep = self.out, _sweep(stage)
        early = [name for name in self.crossing if name in sweep.stream_reads()]
        late = [name for name in self.crossing if name in sweep.reads() and name not in early]
        if isinstance(stage, Loop):
            late.remove(stage.active)
            self._load_state(stage.active)
            out.open(f"if tl.max({stage.active}, axis=0) == 0:")
            out.add("return")
            out.close()
        for name in early:
            self._load_state(name)
        self.sweeps.prologue(sweep)
        self.sweeps.stream(sweep, in_terms=frozenset(early) & self.program.rounded())
        for name in late:
            self._load_state(name)
        self.sweeps.epilogue(sweep)
        for name in self.crossing:
            if name in sweep.writes():
                self._store_state(name)

    def _info(self, missing: list[str]) -> None:
        """Diagnosis, by the last kernel: its values are final there."""
        out = self.out
        if not self.program.info:
            return
        out.open("if RETURN_INFO:")
        for name in self.program.info:
            if name in missing and self.crossing:
                self._load_state(name)
            out.add(f"tl.store({name}_ptr + first_row + offs_m, {name}.to({name}_ptr.dtype.element_ty), mask=row_valid)")
        out.close()

    def _load_state(self, name: str) -> None:
        out = self.out
        if self.crossing[name] is Kind.ROW:
            out.add(f"{name} = tl.load({name}_state + first_row + offs_m, mask=row_valid, other=0.0)")
        elif name in self.program.rounded():
            self._load_rows(f"{name}_high", f"{name}_high_state + first_row * HEAD_DIM", "HEAD_DIM")
            out.add(f"{name}_low = {name}_high")
            out.open("if TERMS == 2:")
            self._load_rows(f"{name}_low", f"{name}_low_state + first_row * HEAD_DIM", "HEAD_DIM")
            out.close()
        else:
            self._load_rows(name, f"{name}_state + first_row * HEAD_DIM", "HEAD_DIM")

    def _store_state(self, name: str) -> None:
        out = self.out
        if self.crossing[name] is Kind.ROW:
            out.add(f"tl.store({name}_state + first_row + offs_m, {name}, mask=row_valid)")
        elif name in self.program.rounded():
            self._store_rows(f"{name}_high", name)
            out.open("if TERMS == 2:")
            self._store_rows(f"{name}_low", f"{name} - {name}.to({name}_high_state.dtype.element_ty).to(tl.float32)")
            out.close()
        else:
            self._store_rows(name, name)

    def _load_rows(self, name: str, base: str, stride: str) -> None:
        self.out.add(f"{name} = load_tile({base}, start_m, seqlen_q, {stride}, HEAD_DIM, BLOCK_Q, BLOCK_D, True)")

    def _store_rows(self, name: str, value: str) -> None:
        base = f"{name}_state + first_row * HEAD_DIM"
        self.out.add(f"store_tile({base}, {value}, start_m, seqlen_q, HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D)")
