"""Printing the backward pass of operators that solve nothing as CUDA C++: a table of row numbers, then sweep by sweep.

How a sweep streams is written by hand in ``include/stream_saved.cuh``, the same for sweeps that hold rows and those that
hold keys; printed are which operands it multiplies, in which order, and the operators' own expressions.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Mapping

from lla_compile.backends.cuda.sweep_arguments import Field
from lla_compile.backends.cuda.sweep_source import TEMPLATES, Lines
from lla_compile.expr import Expr, Kind, fold
from lla_compile.lowering import lower
from lla_compile.sweeps import Assign, Sweep, SweepList

_POINTERS = {"input": "uint16_t", "float32": "float"}
_COUNTS = (
    "batch_heads", "num_heads", "group_size", "row_heads_together", "key_heads_together", "seqlen_q", "seqlen_k",
    "window", "table_rows", "num_sequences",
)  # fmt: skip


@dataclass(frozen=True)
class SweepSource:
    """A sweep as it is printed.

    Attributes:
        sweep: what is printed of it: the part that the wanted outputs need.
        held, streamed: operands of either side; those held in the order in which registers should hold them.
        sums: accumulators.
        numbers: how many a row has.
        value_wide: names as wide as the value.
        headers: texts by the names that the written sources include them by.
    """

    sweep: Sweep
    held: tuple[str, ...]
    streamed: tuple[str, ...]
    sums: tuple[str, ...]
    numbers: int
    value_wide: frozenset[str]
    headers: Mapping[str, str]


@dataclass(frozen=True)
class BackwardSource:
    """What is printed for some outputs of a backward pass.

    Attributes:
        program: all of its sweeps.
        fields: of the arguments that every kernel takes, in order.
        headers: of the kernel that makes the table.
        numbers: of a row, that the table has.
        sweeps: those that the outputs need, in order of launch.
    """

    program: SweepList
    fields: tuple[Field, ...]
    headers: Mapping[str, str]
    numbers: tuple[str, ...]
    sweeps: tuple[SweepSource, ...]

    @property
    def arguments(self) -> struct.Struct:
        return struct.Struct("".join(field.format for field in self.fields))


@lru_cache(maxsize=None)
def print_backward(op: str, wanted: tuple[str, ...] | None = None) -> BackwardSource:
    """The CUDA C++ of an operator's backward pass; ``wanted`` None stands for the outputs of an ordinary call."""
    program = lower(op, "backward")
    reduced = program.wanting(program.ordinary if wanted is None else wanted)
    fields = _fields(program)
    arguments = {"sweep_arguments.cuh": _arguments_text(program, fields)}
    numbers = _numbers(program)
    sweeps = []
    for sweep in reduced.sweeps:
        if sweep.streams:
            printer = _SweepPrinter(program, reduced, sweep, numbers)
            texts = {"operands.cuh": printer.operands_text(), "sweep.cuh": printer.text()}
            sides = printer.held, printer.streamed, printer.sums
            sweeps.append(SweepSource(sweep, *sides, len(numbers), program.value_wide, arguments | texts))
    headers = arguments | {"numbers.cuh": _numbers_text(program, numbers)}
    return BackwardSource(program, fields, headers, numbers, tuple(sweeps))


# ---- the arguments ----


def _fields(program: SweepList) -> tuple[Field, ...]:
    """Inputs, what the forward pass has left, outputs and the table, then strides, numbers and counts, and of packed
    sequences where they end and which tile runs when."""
    inputs = (*program.row_inputs, *program.col_inputs)
    pointers = [(name, "const uint16_t") for name in inputs]
    pointers += [(name, "const float") for name in program.given]
    pointers += [(name, _POINTERS[stored]) for name, stored in program.outputs.items()]
    pointers += [("table", "float"), ("scale_pointer", "const float")]
    fields = [Field(name, f"{of}* {name}", "Q") for name, of in pointers]
    results = (name for name, stored in program.outputs.items() if stored == "input")
    fields += [Field(f"{name}_strides", f"int64_t {name}_strides[3]", "3q") for name in (*inputs, *results)]
    fields.append(Field("scale", "float scale", "f"))
    fields += [Field(name, f"int32_t {name}", "i") for name in _COUNTS]
    fields += [Field(name, f"const int32_t* {name}", "Q") for name in ("cu_seqlens_q", "cu_seqlens_k")]
    return (*fields, *(Field(name, f"int32_t* {name}", "Q") for name in ("row_tiles", "key_tiles")))


def _arguments_text(program: SweepList, fields: tuple[Field, ...]) -> str:
    lines = [f"// Printed: the arguments of {program.name}.", "#pragma once", "#include <ptx.cuh>", ""]
    return "\n".join([*lines, "struct SweepArguments {", *(f"    {field.declaration};" for field in fields), "};", ""])


# ---- the table of row numbers ----


def _numbers(program: SweepList) -> tuple[str, ...]:
    """lse, what weights read, and where scores start; an even count, so that several can be read at once."""
    weights = [assign.value for sweep in program.sweeps for assign in sweep.weights]
    weights += [sums.weight for sweep in program.sweeps for sums in sweep.accumulators]
    read = frozenset().union(*(weight.symbols() for weight in weights))
    rows = sorted(name for name in read if program.kinds.get(name) is Kind.ROW)
    seeds = dict.fromkeys(score.center for sweep in program.sweeps for score in sweep.scores if score.center)
    return ("lse", *rows, *(f"minus_{name}" for name in seeds))


def _numbers_text(program: SweepList, numbers: tuple[str, ...]) -> str:
    """What a row's numbers are, from the prologue of the sweep that holds rows."""
    out = Lines()
    out.add(f"// Printed: the numbers of rows that the sweeps of {program.name} read.")
    out.add("#pragma once")
    out.add("")
    out.open("DEVICE void store_numbers(const RowReader& row)")
    out.add("const SweepArguments& g = row.g;")
    prologue = [assign for sweep in program.sweeps for assign in sweep.prologue]
    read = frozenset().union(*(assign.value.symbols() for assign in prologue))
    for name in program.row_inputs:
        if name in read:
            out.add(f"const Chunk {name} = row.input<{_width(program, name)}>(g.{name}, g.{name}_strides);")
    for name, kind in program.given.items():
        if kind is Kind.VECTOR:
            out.add(f"const Chunk {name} = row.state<{_width(program, name)}>(g.{name});")
        else:
            out.add(f"const float {name} = row.number_of(g.{name}, {'INFINITE' if name == 'lse' else '0'});")
    templates = TEMPLATES | {"dot": "row.dot({0}, {1})"}
    for assign in prologue:
        out.add(f"const float {assign.name} = {_text(assign.value, str, templates)};")
    values = ["lse - WEIGHT_SHIFT", *(name.replace("minus_", "-") for name in numbers[1:])]
    out.add(f"const float numbers[{len(numbers)}] = {{{', '.join(values)}}};")
    out.add("row.store(numbers);")
    out.close()
    return out.text()


def _width(program: SweepList, name: str) -> str:
    return "HEAD_DIM_V" if name in program.value_wide else "HEAD_DIM"


def _text(value: Expr, symbol, templates: Mapping[str, str] = TEMPLATES) -> str:
    """An expression; ``symbol`` makes text of a name."""

    def leaf(x: Expr) -> str:
        if x.op == "symbol":
            return symbol(x.args[0])
        (number,) = x.args
        return f"{'-' if number < 0 else ''}INFINITE" if math.isinf(number) else f"{number!r}f"

    return fold(value, leaf, lambda x, args: templates[x.op].format(*args))


# ---- sweeps ----


class _SweepPrinter:
    """Prints where one sweep's operands lie, what the threads that hold rows or keys do, and what others copy."""

    def __init__(self, program: SweepList, reduced: SweepList, sweep: Sweep, numbers: tuple[str, ...]):
        self.program, self.outputs, self.sweep, self.numbers = (program, reduced.outputs, sweep, numbers)
        self.holds_keys = sweep.holds == "keys"
        self.out = Lines()
        pairs = [(s.col, s.row) if self.holds_keys else (s.row, s.col) for s in sweep.scores]
        self.pairs = dict(zip((s.name for s in sweep.scores), pairs))
        held = [held for held, _ in pairs]
        # Those of most scores first: they are the ones to keep in registers.
        self.held = tuple(sorted(dict.fromkeys(held), key=lambda name: -held.count(name)))
        self.streamed = tuple(dict.fromkeys([*(of for _, of in pairs), *(a.operand for a in sweep.accumulators)]))
        self.sums = tuple(dict.fromkeys(sums.name for sums in sweep.accumulators))

    def operands_text(self) -> str:
        out = self._opening(f"what {self.sweep.name} of {self.program.name} holds and streams")
        out.add("#include <operand_tile.cuh>")
        out.add("")
        out.add(f"constexpr int NUMBERS = {len(self.numbers)};")
        for kind, names, total in (("Held", self.held, "HELD_BYTES"), ("Streamed", self.streamed, "STAGE_BYTES")):
            offset = "0"
            for name in names:
                tile = "ValueTile" if name in self.program.value_wide else "KeyTile"
                out.add(f"using {kind}_{name} = {kind}<{tile}, {offset}>;")
                offset = f"{kind}_{name}::END"
            out.add(f"constexpr int {total} = {offset};")
        return out.text()

    def text(self) -> str:
        out = self.out = self._opening(f"{self.sweep.name} of {self.program.name}")
        out.add("")
        self._copies()
        out.add("")
        out.open("DEVICE void run_sweep(Group& group)")
        out.add("const SweepArguments& g = group.g;")
        for name in self.held:
            out.add(f"group.load<Held_{name}>(g.{name}, g.{name}_strides);")
        out.add("group.loaded();")
        for rank, name in enumerate(self.held):
            out.add(f"HeldOperand<Held_{name}, (IN_REGISTERS > {rank})> {name}(group);")
        out.add("const float scale = group.scale;")
        for name in self.sums:
            out.add(f"Vector<{self._block(name)}> {name};")
            out.add(f"clear({name});")
        out.open("group.stream([&](const Stage& stage)")
        self._scores()
        self._weights()
        self._products()
        out.close("});")
        for name in self.sums:
            out.add(f"finish({name});")
        if self.holds_keys:
            for name in self.sums:
                self._store(name, Kind.VECTOR)
        for assign in self.sweep.epilogue:
            self._assign(assign)
        out.close()
        return out.text()

    @staticmethod
    def _opening(what: str) -> Lines:
        out = Lines()
        out.add(f"// Printed: {what}.")
        out.add("#pragma once")
        return out

    def _block(self, name: str) -> str:
        return "BLOCK_DV" if name in self.program.value_wide else "BLOCK_D"

    def _copies(self) -> None:
        out = self.out
        out.open("DEVICE void copy_sweep(Copier& copier)")
        out.add("const SweepArguments& g = copier.g;")
        out.add("#pragma unroll 1")
        out.open("for (int head = 0; head < copier.heads(); ++head)")
        if self.holds_keys:
            out.add("const float* numbers = copier.first_numbers(head);")
        for name in self.streamed:
            out.add(f"const uint16_t* {name} = copier.first_of<Streamed_{name}>(g.{name}, g.{name}_strides, head);")
        out.add("#pragma unroll 1")
        out.open("for (int at = 0; at < copier.block().tiles; ++at)")
        out.add("copier.begin(at);")
        if self.holds_keys:
            out.add("copier.copy_numbers(numbers);")
        for name in self.streamed:
            out.add(f"copier.copy<Streamed_{name}>({name}, g.{name}, g.{name}_strides, head, at);")
        out.add("copier.end();")
        out.close()
        out.close()
        out.close()

    # ---- a tile ----

    def _scores(self) -> None:
        """The products of scores, of which the first become softmax weights while the others run."""
        out, scores = self.out, self.sweep.scores
        out.add(f"Pairs {', '.join(score.name for score in scores)};")
        for score in scores:
            if score.center:
                number = self.numbers.index(f"minus_{score.center}")
                out.add(f"seed({score.name}, [&](int n, int i) {{ return stage.numbers<{number}, 1>(n)(0, i); }});")
        for score in scores:
            if score.center:
                out.add(f"hold_all({score.name});")
        out.add("stage.group.take_turn();")
        out.add("begin_products();")
        for score in scores:
            held, streamed = self.pairs[score.name]
            seeded = "true" if score.center else "false"
            out.add(f"{held}.multiply<{seeded}, Streamed_{streamed}>({score.name}, stage);")
            if score is scores[0] or score is scores[-1]:
                out.add("commit_products();")
        out.add("stage.group.end_turn();")
        first, *others = (score.name for score in scores)
        out.add(f"wait_product_groups<{int(bool(others))}>();")
        out.add(f"hold_all({first});")
        out.add(f"stage.weigh({first});")
        out.add(f"hold_all({first});")  # before the others are waited for
        if others:
            out.add("wait_product_groups<0>();")
        for name in others:
            out.add(f"hold_all({name});")

    def _weights(self) -> None:
        out, sweep = self.out, self.sweep
        count = len(sweep.accumulators)
        out.add(f"Weights weights[{count}];")
        out.open(f"set_weights(weights, [&](int n, int i, float (&to)[{count}])")
        for name, value in [
            *((assign.name, assign.value) for assign in sweep.weights),
            *((f"to[{number}]", sums.weight) for number, sums in enumerate(sweep.accumulators)),
        ]:
            declared = name if name.startswith("to[") else f"const float {name}"
            out.add(f"{declared} = {_text(value, self._of_pair)};")
        out.close("});")

    def _of_pair(self, name: str) -> str:
        """A symbol in an expression over pairs."""
        scores = [score.name for score in self.sweep.scores]
        if name == "p" or name in scores:
            return f"{scores[0] if name == 'p' else name}[n][i]"
        if name in self.numbers:
            return f"stage.numbers<{self.numbers.index(name)}, 1>(n)(0, i)"
        return name

    def _products(self) -> None:
        out, sweep = self.out, self.sweep
        for name in self.sums:
            out.add(f"hold_all({name}.x);")
        out.add("begin_products();")
        for number, sums in enumerate(sweep.accumulators):
            out.add(f"add_weighted<Streamed_{sums.operand}>({sums.name}, weights[{number}], stage);")
        out.add("commit_products();")
        out.add("wait_product_groups<0>();")
        for name in self.sums:
            out.add(f"hold_all({name}.x);")
        for number in range(len(sweep.accumulators)):
            out.add(f"hold_all(weights[{number}].of);")
        for name in self.held:
            out.add(f"{name}.keep(stage);")

    # ---- after the stream ----

    def _assign(self, assign: Assign) -> None:
        """A row-wise assignment, stored if it is an output."""
        out, name, value = self.out, assign.name, assign.value
        if value.op == "dot":
            product = " * ".join(self._of_vector(x) for x in value.args)
            width = self._block(value.args[0].args[0])
            out.add(f"const Row {name} = sum_of_rows<{width}>([&](int n, int i) {{ return {product}; }});")
        else:
            out.add(f"Vector<{self._block(name)}> {name};")
            out.add(f"assign({name}, [&](int n, int i) {{ return {self._of_vector(value)}; }});")
        self._store(name, value.kind)

    def _of_vector(self, value: Expr) -> str:
        return _text(value, lambda name: name if name == "scale" else f"{name}(n, i)")

    def _store(self, name: str, kind: Kind) -> None:
        if name not in self.outputs:
            return
        if kind is Kind.ROW:
            self.out.add(f"store(g.{name}, {name}, group.rows);")
        else:
            base = f"group.block.of_head(g.{name}, g.{name}_strides)"
            width = _width(self.program, name)
            self.out.add(f"store_result<{width}>({base}, g.{name}_strides[2], {name}, group.rows);")
