"""Printing sweeps that hold query rows as CUDA C++: the arguments of a launch, and what its threads do in order.

How a sweep is carried out, with which instructions and copies, is written by hand in ``include/``; printed are the
operators' own expressions, and which sweeps follow each other.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Iterable, Mapping

from lla_compile.expr import Expr, Kind, fold
from lla_compile.lowering import lower
from lla_compile.sweeps import Assign, Loop, Stage, Sweep, SweepList, sweep_of

_TEMPLATES = {
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
    "gt": "({0} > {1})",
    "lt": "({0} < {1})",
    "and": "({0} && {1})",
    "sqrt": "square_root({0})",
    "log2": "log2f({0})",
    "where": "({0} ? {1} : {2})",
}
# How the value of a ROW is called where an expression ranges over rows, elements of a vector, or pairs.
_ROW_INDEX = {Kind.ROW: "[r]", Kind.VECTOR: "[i / 2]", Kind.TILE: "[r]"}
_POINTERS = {"input": "uint16_t", "float32": "float", "int32": "int32_t"}
_LOOP_BIT = "(({0}[0] > 0 || {0}[1] > 0) << {1})"


@dataclass(frozen=True)
class Field:
    """One member of the arguments: its C++ declaration, and its format for :mod:`struct`."""

    name: str
    declaration: str
    format: str


@dataclass(frozen=True)
class Source:
    """What is printed for an operator's forward pass.

    Attributes:
        headers: texts by the names that the written sources include them by.
        fields: of the arguments, in order.
        program: the sweeps.
        waiting: vectors that wait while keys are streamed, in order of their slots.
        loops: how many loops there are.
    """

    headers: Mapping[str, str]
    fields: tuple[Field, ...]
    program: SweepList
    waiting: tuple[str, ...]
    loops: int

    @property
    def arguments(self) -> struct.Struct:
        return struct.Struct("".join(field.format for field in self.fields))


@lru_cache(maxsize=None)
def print_sweeps(op: str, phase: str) -> Source:
    """The CUDA C++ of an operator's sweeps; all of them have to hold query rows."""
    program = lower(op, phase)
    waiting = tuple(
        name
        for name, kind in program.crossing((stage,) for stage in program.stages).items()
        if kind is Kind.VECTOR and name not in program.rounded
    )
    # What every turn of a loop reads and writes is kept closest.
    loops = [stage.sweep for stage in program.stages if isinstance(stage, Loop)]
    waiting = tuple(sorted(waiting, key=lambda name: (-_turns_with(name, loops), name)))
    fields = _fields(program, waiting)
    headers = {
        "sweep_arguments.cuh": _arguments_text(program, fields, len(loops)),
        "sweeps.cuh": _SweepsPrinter(program, waiting).text(),
    }
    return Source(headers, fields, program, waiting, len(loops))


def _turns_with(name: str, loops: Iterable[Sweep]) -> int:
    """How often a turn of the loops touches a vector."""
    return sum((name in sweep.reads()) + (name in sweep.writes()) for sweep in loops)


def _fields(program: SweepList, waiting: tuple[str, ...]) -> tuple[Field, ...]:
    def pointer(name: str, of: str) -> Field:
        return Field(name, f"{of}* {name}", "Q")

    inputs = (*program.row_inputs, *program.col_inputs)
    fields = [pointer(name, "const uint16_t") for name in inputs]
    for name, stored in program.outputs.items():
        fields.append(pointer(name, "uint16_t" if name in program.rounded else _POINTERS[stored]))
    fields += [pointer(name, "float") for name in waiting if name not in program.outputs]
    fields += [pointer(f"{name}_pointer", "const float") for name in ("scale", *program.row_scalars)]
    results = [name for name, stored in program.outputs.items() if stored == "input"]
    strided = (*inputs, *results, *program.row_scalars)
    fields += [Field(f"{name}_strides", f"int64_t {name}_strides[3]", "3q") for name in strided]
    fields.append(Field("state_rows", "int64_t state_rows", "q"))
    numbers = ("scale", *program.row_scalars, *program.scalars)
    fields += [Field(name, f"float {name}", "f") for name in numbers]
    counts = ("batch_heads", "num_heads", "group_size", "heads_per_group", "seqlen_q", "seqlen_k", "window")
    fields += [Field(name, f"int32_t {name}", "i") for name in counts]
    return tuple(fields)


def _arguments_text(program: SweepList, fields: tuple[Field, ...], loops: int) -> str:
    lines = [f"// Printed: the arguments of the sweeps of {program.name}.", "#pragma once", "#include <ptx.cuh>", ""]
    lines += [f"constexpr int LOOPS = {loops};", "", "struct SweepArguments {"]
    lines += [f"    {field.declaration};" for field in fields]
    return "\n".join([*lines, "};", ""])


class _Lines(list):
    def __init__(self):
        super().__init__()
        self.depth = 0

    def add(self, text: str) -> None:
        self.append("    " * self.depth + text)

    def open(self, text: str) -> None:
        self.add(text + " {")
        self.depth += 1

    def close(self, text: str = "}") -> None:
        self.depth -= 1
        self.add(text)


class _SweepsPrinter:
    """Prints what the threads that hold rows do, and those that copy."""

    def __init__(self, program: SweepList, waiting: tuple[str, ...]):
        self.program, self.waiting = program, waiting
        self.out = _Lines()
        self.terms = "TERMS"  # of what is rounded where the printer stands
        self.terms_of: dict[str, str] = {}  # of the rounded vectors as they were last assigned
        self.dots = self.rows = 0

    def text(self) -> str:
        out, program = self.out, self.program
        out.add(f"// Printed: the sweeps of {program.name}.")
        out.add("#pragma once")
        out.add("")
        out.add("DEVICE void run_sweeps(Group& group) {")
        out.depth += 1
        out.add("const SweepArguments& g = group.g;")
        out.add("const Rows& rows = group.rows;")
        for name in program.row_inputs:
            out.add(f"const QueryRows& {name} = group.{name};")
        rows = [name for name, kind in program.kinds.items() if kind is Kind.ROW]
        rows += ["row_max", "row_sum"] if any(sweep.softmax == "online" for sweep in program.sweeps) else []
        out.add(f"Row {', '.join(rows)};")
        for name in program.row_scalars:
            out.add(f"const Row {name} = group.given(g.{name}_pointer, g.{name}, g.{name}_strides);")
        for name in sorted(program.rounded):
            out.add(f"Direction {name} = group.rounded();")
        for slot, name in enumerate(self.waiting):
            out.add(f"const Waiting<{slot}> waiting_{name}(group, g.{name});")
        for stages in self._groups():
            out.add("")
            if isinstance(stages[0], Loop):
                self._loops(stages)
            else:
                out.add("{")
                out.depth += 1
                self._sweep(stages[0], stages)
                out.close()
        out.close()
        out.add("")
        self._copies()
        return "\n".join(line.rstrip() for line in out) + "\n"

    def _groups(self) -> list[tuple[Stage, ...]]:
        """Stages in order; loops that follow each other take turns of one loop, as groups of rows need them."""
        groups: list[tuple[Stage, ...]] = []
        for stage in self.program.stages:
            if groups and isinstance(stage, Loop) and isinstance(groups[-1][0], Loop):
                groups[-1] += (stage,)
            else:
                groups.append((stage,))
        return groups

    # ---- stages ----

    def _loops(self, loops: tuple[Loop, ...]) -> None:
        """Turns, each of which every group of rows takes with the first of the loops that it is not through with.

        A loop in several terms is left out where operands have one term and a coarse loop does it all.
        """
        out = self.out
        skips = [self.program.refines and not loop.coarse for loop in loops]
        out.add(f"// {', '.join(loop.sweep.name for loop in loops)}")
        first = "TERMS == 2 ? 0 : 1" if skips[0] else "0"
        out.add(f"int loop = {first};")
        out.open("for (;;)")
        bits = [_LOOP_BIT.format(loop.active, number) for number, loop in enumerate(loops)]
        out.add(f"const Flags wanted = group.vote({' | '.join(bits)});")
        out.add("if (wanted.none()) break;")
        for number, loop in enumerate(loops):
            if number:
                out.open(f"if (TERMS == 2 && loop == {number - 1} && !wanted.wants({number - 1}))")
                out.add(f"loop = {number};")
                self.terms = "1" if loop.coarse else "TERMS"
                self._assign_all(loop.entry)
                out.close()
        for number, loop in enumerate(loops):
            guard = "TERMS == 2 && " if skips[number] else ""
            out.open(f"{'} else ' if number else ''}if ({guard}loop == {number} && wanted.wants({number}))")
            self.terms = "1" if loop.coarse else "TERMS"
            self._sweep(loop.sweep, loops, entered=loop)
            out.depth -= 1
        out.open("} else")
        out.add("group.pass_stream<false>();")
        out.close()
        out.close()
        for loop in loops:
            self._store_outputs(loop, loops)
        self.terms = "TERMS"

    def _sweep(self, sweep: Sweep, stages: tuple[Stage, ...], entered: Loop | None = None) -> None:
        out = self.out
        if entered is None:
            out.add(f"// {sweep.name}")
        else:
            # What the loop rounds it has rounded in its own terms, from its entry on.
            rounds = {a.name for a in (*entered.entry, *sweep.epilogue) if a.value.op == "rounded"}
            self.terms_of |= dict.fromkeys(rounds, self.terms)
        self._assign_all(sweep.prologue)
        (sums,) = sweep.accumulators
        width = self._width(sums.name)
        out.add(f"Vector<{width}> {sums.name};")
        values = "true" if sums.operand == "v" else "false"
        second = sweep.scores[1] if len(sweep.scores) > 1 else None
        online = sweep.softmax == "online"
        out.add("OnlineSoftmax softmax;" if online else "SavedSoftmax softmax(lse);")
        row = f"&{second.row}" if second else "nullptr"
        center = second.center if second and second.center else "Row{}"
        named = second.name if second else ""
        weight = self._text(sums.weight, Kind.TILE)
        out.add(f"auto weight = [&](float p, float {named}, int r) {{ return {weight}; }};")
        arguments = f"{sums.name}, softmax, {row}, {center}, weight"
        out.add(f"group.stream<{self.terms}, {'true' if second else 'false'}, {values}>({arguments});")
        if online:
            out.add("softmax.end(rows);")
            out.add("assign(row_max, [&](int r) { return softmax.maximum[r]; });")
            out.add("assign(row_sum, [&](int r) { return softmax.sum[r]; });")
        else:
            out.add(f"softmax.end({sums.name});")
        self._assign_all(sweep.epilogue, at_hand={sums.name})
        if entered is None:
            self._store_outputs(sweep, stages)

    def _store_outputs(self, stage: Stage, stages: tuple[Stage, ...]) -> None:
        """What has its last value now."""
        program = self.program
        later = {name for other in program.stages[program.stages.index(stage) + 1 :] for name in other.writes()}
        for name in stage.writes():
            if name not in program.outputs or name in later or name in self.waiting:
                continue
            if program.kinds[name] is Kind.ROW:
                self.out.add(f"store(g.{name}, {name}, rows);")
            elif name in program.rounded:
                self.out.add(f"{name}.store<{self.terms}>(g.{name}, g.state_rows * HEAD_DIM, rows);")
            else:
                width = "HEAD_DIM_V" if name in program.value_wide else "HEAD_DIM"
                base = f"group.tile.result(g.{name}, g.{name}_strides)"
                self.out.add(f"store_result<{width}>({base}, g.{name}_strides[2], {name}, rows);")

    def _copies(self) -> None:
        out = self.out
        out.open("DEVICE void copy_sweeps(Copier& copier)")
        groups = self._groups()
        for stages in groups:
            values = {sums.operand == "v" for stage in stages for sums in sweep_of(stage).accumulators}
            (with_values,) = values
            last = "true" if stages is groups[-1] else "false"
            stream = f"copier.stream<{'true' if with_values else 'false'}, {last}>();"
            out.add(f"while (!copier.vote().none()) {stream}" if isinstance(stages[0], Loop) else stream)
        out.close()

    # ---- row-wise assignments ----

    def _assign_all(self, assigns: tuple[Assign, ...], at_hand: set[str] | None = None) -> None:
        """Assignments; vectors that wait are fetched before the first one that reads them, put back after the last."""
        at_hand = set() if at_hand is None else at_hand
        last_write = {assign.name: number for number, assign in enumerate(assigns)}
        for number, assign in enumerate(assigns):
            for name in sorted(assign.value.symbols() & set(self.waiting) - at_hand):
                self.out.add(f"Vector<{self._width(name)}> {name};")
                self.out.add(f"waiting_{name}.load({name});")
                at_hand.add(name)
            self._assign(assign, at_hand)
            at_hand.add(assign.name)
            if assign.name in self.waiting and last_write[assign.name] == number:
                self.out.add(f"waiting_{assign.name}.store({assign.name});")

    def _assign(self, assign: Assign, at_hand: set[str]) -> None:
        out, name, value = self.out, assign.name, assign.value
        if value.op == "rounded":
            text = self._text(self._without_rows(value.args[0]), Kind.VECTOR)
            out.add(f"{name}.assign<{self.terms}>([&](int n, int i) {{ return {text}; }});")
            self.terms_of[name] = self.terms
            return
        value = self._without_dots(value)
        if value.kind is Kind.VECTOR:
            value = self._without_rows(value)
            if name not in at_hand:
                out.add(f"Vector<{self._width(name)}> {name};")
            out.add(f"assign({name}, [&](int n, int i) {{ return {self._text(value, Kind.VECTOR)}; }});")
        else:
            out.add(f"assign({name}, [&](int r) {{ return {self._text(value, Kind.ROW)}; }});")

    def _without_dots(self, value: Expr) -> Expr:
        """The expression with its inner products, which are printed first, as rows of their own."""
        if value.op in ("symbol", "const"):
            return value
        if value.op in ("dot", "wide_dot"):
            x, y = (self._text(x, Kind.VECTOR) for x in value.args)
            self.dots += 1
            self.out.add(
                f"const Row dot_{self.dots} = sum_of_rows<BLOCK_D>([&](int n, int i) {{ return {x} * {y}; }});"
            )
            return Expr("symbol", (f"dot_{self.dots}",), Kind.ROW)
        return Expr(value.op, tuple(self._without_dots(x) for x in value.args), value.kind)

    def _without_rows(self, value: Expr) -> Expr:
        """The expression with what is the same for all elements of a row, which is printed first."""
        if value.op in ("symbol", "const"):
            return value
        if value.kind is not Kind.ROW:
            return Expr(value.op, tuple(self._without_rows(x) for x in value.args), value.kind)
        self.rows += 1
        self.out.add(f"Row row_{self.rows};")
        self.out.add(f"assign(row_{self.rows}, [&](int r) {{ return {self._text(value, Kind.ROW)}; }});")
        return Expr("symbol", (f"row_{self.rows}",), Kind.ROW)

    def _text(self, value: Expr, kind: Kind) -> str:
        """An expression that ranges over ``kind``."""

        def leaf(x: Expr) -> str:
            if x.op == "const":
                (number,) = x.args
                return f"{'-' if number < 0 else ''}INFINITE" if math.isinf(number) else f"{number!r}f"
            (name,) = x.args
            if x.kind is Kind.ROW:
                return f"{name}{_ROW_INDEX[kind]}"
            if x.kind is Kind.VECTOR:
                if name in self.program.rounded:
                    return f"{name}.value<{self.terms_of[name]}>(n, i)"
                return f"{name}(n, i)"
            return f"g.{name}" if x.kind is Kind.SCALAR else name

        return fold(value, leaf, lambda x, args: _TEMPLATES[x.op].format(*args))

    def _width(self, name: str) -> str:
        return "BLOCK_DV" if name in self.program.value_wide else "BLOCK_D"
