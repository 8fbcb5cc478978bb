"""Printing sweeps that hold query rows as CUDA C++: what the threads of a launch do in order.

How a sweep is carried out, with which instructions and copies, is written by hand in ``include/``; printed are the
operators' own expressions, and which sweeps follow each other.
"""

from __future__ import annotations

import math
from typing import Iterable

from lla_compile.backends.cuda.sweep_arguments import Field, arguments_text
from lla_compile.backends.cuda.sweep_waiting import made_early
from lla_compile.expr import Expr, Kind, fold
from lla_compile.sweeps import Assign, Loop, P, Stage, Sweep, SweepList, sweep_of

TEMPLATES = {
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
_LOOP_BIT = "(({0}[0] > 0 || {0}[1] > 0) << {1})"


class Lines(list):
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

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self) + "\n"


class SweepsPrinter:
    """Prints what the threads that hold rows do, and what those that only copy do.

    Args:
        program: the sweeps.
        waiting: vectors that wait while keys are streamed, in order of their slots.
        waiting_rows: the same of numbers of rows.
        groups: the stages to print, see :func:`lla_compile.backends.cuda.sweep_parts.loops_together`.
    """

    includes: tuple[str, ...] = ()  # of the printed sweeps
    turns = "while"  # of loops, in one launch

    def __init__(
        self,
        program: SweepList,
        waiting: tuple[str, ...],
        waiting_rows: tuple[str, ...],
        groups: tuple[tuple[Stage, ...], ...],
    ):
        self.program, self.waiting, self.waiting_rows, self.groups = program, waiting, waiting_rows, groups
        self.out = Lines()
        self.terms = "TERMS"  # of what is rounded where the printer stands
        self.terms_of: dict[str, str] = {}  # of the rounded vectors as they were last assigned
        self.dots = self.rows = 0

    def headers(self, fields: tuple[Field, ...]) -> dict[str, str]:
        """What the written sources include, with arguments of these fields."""
        loops = sum(isinstance(stage, Loop) for stage in self.program.stages)
        return {
            "sweep_arguments.cuh": arguments_text(self.program, fields, loops),
            "sweeps.cuh": self._sweeps_text(),
            "copies.cuh": self._copies_text(),
        }

    def _sweeps_text(self) -> str:
        out, program = self.out, self.program
        out.add(f"// Printed: the sweeps of {program.name}.")
        out.add("#pragma once")
        if any(sweep.means() for sweep in program.sweeps):
            out.add("#include <mean_stream.cuh>")
        for name in self.includes:
            out.add(f"#include <{name}>")
        out.add("")
        out.add("DEVICE void run_sweeps(Group& group) {")
        out.depth += 1
        out.add("const SweepArguments& g = group.g;")
        out.add("const Rows& rows = group.rows;")
        for number, name in enumerate(program.row_inputs):
            out.add(f"const QueryRows {name} = group.input({number});" if number else "const QueryRows& q = group.q;")
        rows = [x for x, kind in program.kinds.items() if kind is Kind.ROW and x not in self.waiting_rows]
        rows += ["row_max", "row_sum"] if any(sweep.softmax == "online" for sweep in program.sweeps) else []
        out.add(f"Row {', '.join(rows)};")
        self._open_waiting_rows()
        for name in program.row_scalars:
            if name not in self.waiting_rows:
                out.add(f"const Row {name} = group.given(g.{name}_pointer, g.{name}, g.{name}_strides);")
        for name in sorted(program.rounded):
            out.add(f"Direction {name} = group.rounded();")
        for slot, name in enumerate(self.waiting):
            is_result = "true" if name in program.outputs else "false"
            out.add(f"const Waiting<{slot}, {is_result}> waiting_{name}(group, g.{name});")
        for stages in self.groups:
            out.add("")
            if isinstance(stages[0], Loop):
                out.add(f"// {', '.join(loop.sweep.name for loop in stages)}")
                self._loops(stages)
            else:
                out.add("{")
                out.depth += 1
                self._sweep(stages[0], stages)
                out.close()
        out.close()
        return out.text()

    def _open_waiting_rows(self) -> None:
        for slot, name in enumerate(self.waiting_rows):
            self.out.add(f"WaitingRow<{slot}> waiting_{name}(group);")
        for name in self.waiting_rows:
            if name in self.program.row_scalars:
                self.out.add(f"waiting_{name}.store(group.given(g.{name}_pointer, g.{name}, g.{name}_strides));")

    # ---- stages ----

    def _loops(self, loops: tuple[Loop, ...]) -> None:
        """Turns, each of which every group of rows takes with the first of the loops that it is not through with."""
        self.out.add(f"int loop = {self.first_loop(loops)};")
        self.out.open("for (;;)")
        self._vote(loops, "break")
        self._enter(loops)
        self._turn(loops)
        self.out.close()
        for loop in loops:
            self._store_outputs(loop, loops, loop.writes(), set())
        self.terms = "TERMS"

    def first_loop(self, loops: tuple[Loop, ...]) -> str:
        """The number of the one that groups of rows begin with."""
        return "TERMS == 2 ? 0 : 1" if self._needs_two_terms(loops[0]) else "0"

    def _needs_two_terms(self, loop: Loop) -> bool:
        """Whether a loop is left out where operands have one term and a coarse loop does it all."""
        return self.program.refines and not loop.coarse

    def _vote(self, loops: tuple[Loop, ...], leave: str) -> None:
        """What groups still want; the statement ``leave`` if that is nothing."""
        self._fetch({loop.active for loop in loops}, set())
        bits = [_LOOP_BIT.format(loop.active, number) for number, loop in enumerate(loops)]
        self.out.add(f"const Flags wanted = group.vote({' | '.join(bits)});")
        self.out.add(f"if (wanted.none()) {leave};")

    def _enter(self, loops: tuple[Loop, ...]) -> None:
        """A group that is through with a loop enters the next one."""
        for number, loop in enumerate(loops[1:], 1):
            self.out.open(f"if (TERMS == 2 && loop == {number - 1} && !wanted.wants({number - 1}))")
            self.out.add(f"loop = {number};")
            self.terms = "1" if loop.coarse else "TERMS"
            self._assign_all(loop.entry, set())
            self.out.close()

    def _turn(self, loops: tuple[Loop, ...]) -> None:
        """One turn of the loop that a group is in."""
        out = self.out
        for number, loop in enumerate(loops):
            guard = "TERMS == 2 && " if self._needs_two_terms(loop) else ""
            out.open(f"{'} else ' if number else ''}if ({guard}loop == {number} && wanted.wants({number}))")
            self.terms = "1" if loop.coarse else "TERMS"
            self._sweep(loop.sweep, loops, entered=loop)
            out.depth -= 1
        out.open("} else")
        out.add("group.pass_stream<false>();")
        out.close()

    def _sweep(self, sweep: Sweep, stages: tuple[Stage, ...], entered: Loop | None = None) -> None:
        out = self.out
        if entered is None:
            out.add(f"// {sweep.name}")
        else:
            # What the loop rounds it has rounded in its own terms, from its entry on.
            rounds = {a.name for a in (*entered.entry, *sweep.epilogue) if a.value.op == "rounded"}
            self.terms_of |= dict.fromkeys(rounds, self.terms)
        at_hand: set[str] = set()
        self._assign_all(sweep.prologue, at_hand)
        later = {assign.name for assign in sweep.epilogue}
        if entered is None:
            self._store_outputs(sweep, stages, {a.name for a in sweep.prologue} - later, at_hand)
        if sweep.means():
            self._stream_means(sweep)
        else:
            self._stream(sweep)
        at_hand |= sweep.sums()
        self._assign_all(sweep.epilogue, at_hand)
        if entered is None:
            written = {*later, *sweep.sums(), *sweep.means()}
            self._store_outputs(sweep, stages, written, at_hand)

    def _stream(self, sweep: Sweep) -> None:
        """One pass over the keys for one sum."""
        out = self.out
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

    def _stream_means(self, sweep: Sweep) -> None:
        """One pass for the sum of values and a sum about it, whose weights take a score relative to its mean."""
        out = self.out
        (_, score), (sums, about) = sweep.scores, sweep.accumulators
        assert score.mean and sums.weight == P and about.about == sums.name and sums.operand == about.operand == "v"
        out.add(f"Vector<{self._width(sums.name)}> {sums.name}, {about.name};")
        out.add("MeanSoftmax softmax(group.scale_log2);")
        out.add(f"auto weight = [](float p, float {score.name}) {{ return {self._text(about.weight, Kind.TILE)}; }};")
        out.add(f"stream_means(group, {sums.name}, {about.name}, softmax, {score.row}, weight);")
        out.add(f"softmax.end(rows, {sums.name}, {about.name});")
        for name, of in (("row_max", "maximum"), ("row_sum", "sum"), (score.mean, "mean")):
            out.add(f"assign({name}, [&](int r) {{ return softmax.{of}[r]; }});")

    def _store_outputs(
        self, stage: Stage, stages: tuple[Stage, ...], written: Iterable[str], at_hand: set[str]
    ) -> None:
        """What has its last value now: rows do not keep it while keys are streamed."""
        program = self.program
        later = {name for other in program.stages[program.stages.index(stage) + 1 :] for name in other.writes()}
        for name in program.outputs:
            if name not in written or name in later or name in self.waiting:
                continue
            self._fetch({name}, at_hand)
            if program.kinds[name] is Kind.ROW:
                self.out.add(f"store(g.{name}, {name}, rows);")
            elif name in program.rounded:
                self.out.add(f"{name}.store<{self.terms}>(g.{name}, g.state_rows * HEAD_DIM, rows);")
            elif program.outputs[name] == "float32":
                width = "HEAD_DIM_V" if name in program.value_wide else "HEAD_DIM"
                self.out.add(f"store_state<{width}>(g.{name}, {name}, rows);")
            else:
                width = "HEAD_DIM_V" if name in program.value_wide else "HEAD_DIM"
                base = f"group.tile.result(g.{name}, g.{name}_strides)"
                self.out.add(f"store_result<{width}>({base}, g.{name}_strides[2], {name}, rows);")

    def _copies_text(self) -> str:
        """For threads that only copy: the passes of those that hold rows, in the same order."""
        out = Lines()
        out.add(f"// Printed: the copies of {self.program.name}.")
        out.add("#pragma once")
        out.add("")
        out.open("DEVICE void copy_sweeps(Copier& copier)")
        for stages in self.groups:
            values = {sums.operand == "v" for stage in stages for sums in sweep_of(stage).accumulators}
            (with_values,) = values
            last = "true" if stages is self.groups[-1] else "false"
            stream = f"copier.stream<{'true' if with_values else 'false'}, {last}>();"
            out.add(f"{self.turns} (!copier.vote().none()) {stream}" if isinstance(stages[0], Loop) else stream)
        out.close()
        return out.text()

    # ---- row-wise assignments ----

    def _fetch(self, names: Iterable[str], at_hand: set[str]) -> None:
        """Those that wait and are not at hand."""
        for name in sorted({*self.waiting, *self.waiting_rows}.intersection(names) - at_hand):
            self._declare(name)
            self.out.add(f"waiting_{name}.load({name});")
            at_hand.add(name)

    def _declare(self, name: str) -> None:
        self.out.add(f"{'Row' if name in self.waiting_rows else f'Vector<{self._width(name)}>'} {name};")

    def _assign_all(self, assigns: tuple[Assign, ...], at_hand: set[str]) -> None:
        """Assignments; what waits is fetched before the first one that reads it, and put back after the last."""
        waits = {*self.waiting, *self.waiting_rows}
        assigns = made_early(assigns, self.waiting)
        last_write = {assign.name: number for number, assign in enumerate(assigns)}
        for number, assign in enumerate(assigns):
            self._fetch(assign.value.symbols(), at_hand)
            self._assign(assign, at_hand)
            at_hand.add(assign.name)
            if assign.name in waits and last_write[assign.name] == number:
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
                self._declare(name)
            out.add(f"assign({name}, [&](int n, int i) {{ return {self._text(value, Kind.VECTOR)}; }});")
        else:
            if name in self.waiting_rows and name not in at_hand:
                self._declare(name)
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

        return fold(value, leaf, lambda x, args: TEMPLATES[x.op].format(*args))

    def _width(self, name: str) -> str:
        return "BLOCK_DV" if name in self.program.value_wide else "BLOCK_D"
