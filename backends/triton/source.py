"""Printing sweeps as Triton kernels. Needs no Triton: the text can be read, hashed and compared anywhere.

A schedule cuts the stages of an operator into launches. `split` makes one of every stage; `fused` lets all stages that
hold query rows share one, and only sweeps that hold keys have their own. Every kernel is the same pieces in another
order: the opening (which tile, whose inputs), the sweeps, and loads and stores of what crosses a launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lla_compile.backends.triton.cache_source import CACHE_HEADER, CachedRowKernelPrinter
from lla_compile.backends.triton.kernel_source import KeyKernelPrinter, RowKernelPrinter, strided_outputs
from lla_compile.backends.triton.part_source import PART_IMPORT, PART_PARAMETERS, MergeKernelPrinter, PartKernelPrinter
from lla_compile.lowering import lower
from lla_compile.sweeps import Loop, Stage, SweepList, sweep_of

_HEADER = """\
import triton
import triton.language as tl

from lla_compile.backends.triton.primitives import (
    accumulate,
    joined,
    key_segments,
    load_rows,
    load_tile,
    low_term,
    packed_tile,
    program_head,
    query_segments,
    representable,
    rounded,
    row_tile,
    score_product,
    store_rows,
    store_tile,
    visible,
    wide_dot,
)
"""

_SEEDED_IMPORT = "from lla_compile.backends.triton.mean_primitives import seeded_product\n"

# What kernels take beside tensors, strides and the solver's numbers: pointers, and counts. Decoding has its own.
_POINTERS = ("cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "row_tiles_ptr", "key_tiles_ptr")
_COUNTS = (
    ("state_rows", "i64"),
    *((name, "i32") for name in (
        "batch_heads", "num_heads", "group_size", "row_heads_per_group", "key_heads_per_group",
        "seqlen_q", "seqlen_k", "window", "num_sequences",
    )),
)  # fmt: skip
# What decoding in parts launches, in order.
_PART_PRINTERS = {"part": PartKernelPrinter, "merge": MergeKernelPrinter}
_CACHE_POINTERS = ("seqlens_ptr", "block_table_ptr")
_CACHE_COUNTS = tuple(
    (name, "i32") for name in ("table_stride", "num_kv_heads", "group_size", "seqlen_q", "capacity", "window")
)


@dataclass(frozen=True)
class Kernel:
    """A printed kernel.

    Attributes:
        name: of its function in the module.
        holds: "rows" or "keys", the side whose tiles are its programs.
        loop: the loop that a launch is one turn of, or None.
    """

    name: str
    holds: str
    loop: Loop | None


@dataclass(frozen=True)
class Module:
    """Source text and what it needs at run time.

    Attributes:
        text: the source.
        program: the sweeps that are printed.
        kernels: in order of launch; all take ``parameters`` and after them ``constexprs``.
        parameters: argument names in order, with Triton types: "*in" is a pointer to the input type, "*wide" one to
            float64 where the tier is wide and to float32 elsewhere.
        constexprs: names of the compile-time constants in order.
        state: what crosses launches and is no output, with kinds.
    """

    text: str
    program: SweepList
    kernels: tuple[Kernel, ...]
    parameters: tuple[tuple[str, str], ...]
    constexprs: tuple[str, ...]
    state: tuple[str, ...]


@lru_cache(maxsize=None)
def print_module(
    op: str, phase: str, schedule: str, one_sum_a_sweep: bool = False, wanted: tuple[str, ...] | None = None
) -> Module:
    """The Triton module that computes the outputs ``wanted`` of an operator (all if None) under a schedule.

    ``one_sum_a_sweep``: see :meth:`lla_compile.sweeps.SweepList.one_sum_a_sweep`.
    """
    program = lower(op, phase)
    program = program.wanting(tuple(program.outputs) if wanted is None else wanted)
    if one_sum_a_sweep:
        program = program.one_sum_a_sweep()
    launches = _launches(program, schedule)
    state = tuple(name for name in program.crossing(launches) if name not in program.outputs)
    cached = phase == "decode"
    parameters = _parameters(program, state, cached)
    row_printer = CachedRowKernelPrinter if cached else RowKernelPrinter
    texts, kernels = [], []
    for stages in launches:
        sweep = sweep_of(stages[0])
        lone_loop = stages[0] if len(stages) == 1 and isinstance(stages[0], Loop) else None
        kernel = Kernel(_name(program, stages), sweep.holds, lone_loop)
        printer = (row_printer if sweep.holds == "rows" else KeyKernelPrinter)(
            program, {*state, *program.outputs, *program.given}
        )
        texts.append(printer.print(kernel.name, stages, parameters))
        kernels.append(kernel)
    header = CACHE_HEADER if cached else _HEADER
    if any(score.seeded for sweep in program.sweeps for score in sweep.scores):
        header += _SEEDED_IMPORT
    text = "\n\n".join([header, *texts])
    return Module(text, program, tuple(kernels), parameters, printer.constexprs, state)


@lru_cache(maxsize=None)
def print_parts(op: str) -> Module:
    """The Triton module that decodes an operator of one sweep in parts: the pass and the merge."""
    program = lower(op, "decode")
    parameters = (*_parameters(program, (), cached=True), *PART_PARAMETERS)
    texts, kernels = [], []
    for name, printer_type in _PART_PRINTERS.items():
        printer = printer_type(program, {*program.outputs})
        kernels.append(Kernel(f"{program.name}_{name}", "rows", None))
        texts.append(printer.print(kernels[-1].name, program.stages, parameters))
    text = "\n\n".join([CACHE_HEADER + PART_IMPORT, *texts])
    return Module(text, program, tuple(kernels), parameters, printer.constexprs, ())


def _launches(program: SweepList, schedule: str) -> list[tuple[Stage, ...]]:
    if schedule == "split":
        return [(stage,) for stage in program.stages]
    rows = tuple(stage for stage in program.stages if sweep_of(stage).holds == "rows")
    keys = [(stage,) for stage in program.stages if sweep_of(stage).holds == "keys"]
    return ([rows] if rows else []) + keys


def _name(program: SweepList, stages: tuple[Stage, ...]) -> str:
    return f"{program.name}_{sweep_of(stages[0]).name if len(stages) == 1 else 'fused'}"


def _parameters(program: SweepList, state: tuple[str, ...], cached: bool) -> tuple[tuple[str, str], ...]:
    inputs = (*program.row_inputs, *program.col_inputs)
    parameters = [(f"{name}_ptr", "*in") for name in inputs]
    for name in (*program.given, *program.outputs, *state):
        stored = program.outputs.get(name, "float32")
        if name in program.rounded or stored == "input":
            kind = "*in"
        elif name in program.wide:
            kind = "*wide"
        else:
            kind = "*i32" if stored == "int32" else "*fp32"
        parameters.append((f"{name}_ptr", kind))
    parameters += [(name, "*i32") for name in (_CACHE_POINTERS if cached else _POINTERS)]
    for name in ("scale", *program.row_scalars):
        parameters += [(f"{name}_ptr", "*fp32"), (name, "fp32")]
    for name in (*program.row_scalars, *inputs, *strided_outputs(program)):
        parameters += [(f"{name}_stride_{axis}", "i64") for axis in "bhn"]
    parameters += [(name, "fp32") for name in program.scalars]
    return (*parameters, *(_CACHE_COUNTS if cached else _COUNTS))
