"""Printing the parts of the schedule `split`: the same sweeps as in `fused`, with what crosses launches in memory."""

from __future__ import annotations

from typing import Iterable, Mapping

from lla_compile.backends.cuda.sweep_source import SweepsPrinter
from lla_compile.expr import Kind
from lla_compile.sweeps import Loop, Stage, Sweep, SweepList


class PartPrinter(SweepsPrinter):
    """A sweep, or one turn of loops.

    What a stream of keys needs is loaded when a part begins and stored when it ends; everything else is in memory all
    the time, and rows fetch it where they use it.

    Args:
        program, waiting, waiting_rows: see :class:`SweepsPrinter`.
        stages: of the part.
        then: those of the next one.
        crossing: what crosses parts, with kinds.
    """

    includes = ("crossing_rows.cuh",)
    turns = "if"

    def __init__(
        self,
        program: SweepList,
        waiting: tuple[str, ...],
        waiting_rows: tuple[str, ...],
        stages: tuple[Stage, ...],
        then: tuple[Stage, ...],
        crossing: Mapping[str, Kind],
    ):
        super().__init__(program, waiting, waiting_rows, (stages,))
        self.then, self.crossing = then, crossing
        self.carried = tuple(name for name in crossing if name not in (*waiting, *waiting_rows))

    def _open_waiting_rows(self) -> None:
        for name in self.waiting_rows:
            given = f"GivenRow waiting_{name}{{group, g.{name}_pointer, g.{name}, g.{name}_strides}};"
            crosses = f"RowInMemory waiting_{name}(g.{name}, rows);"
            self.out.add(f"const {given if name in self.program.row_scalars else crosses}")

    def _loops(self, loops: tuple[Loop, ...]) -> None:
        self.out.add("const LoopInMemory loop_in_memory(group);")
        self.out.add("int loop = loop_in_memory.load();")
        self._vote(loops, "return")
        self._load(loops)
        self._enter(loops)
        self.out.add("loop_in_memory.store(loop);")
        self._turn(loops)

    def _sweep(self, sweep: Sweep, stages: tuple[Stage, ...], entered: Loop | None = None) -> None:
        if entered is None:
            self._load(stages)
        super()._sweep(sweep, stages, entered)
        self._store(sweep)
        if self.then and isinstance(self.then[0], Loop):
            self.out.add(f"LoopInMemory(group).store({self.first_loop(self.then)});")

    def _load(self, stages: tuple[Stage, ...]) -> None:
        read = frozenset().union(*(stage.reads() for stage in stages))
        for name in self.carried:
            if name in read and self.crossing[name] is Kind.ROW:
                self.out.add(f"RowInMemory(g.{name}, rows).load({name});")
            elif name in read:
                self.out.add(f"{name}.load<{self.terms}>(g.{name}, g.state_rows * HEAD_DIM, rows);")
                self.terms_of[name] = self.terms

    def _store(self, sweep: Sweep) -> None:
        for name in self.carried:
            if name in sweep.writes() and self.crossing[name] is Kind.ROW:
                self.out.add(f"RowInMemory(g.{name}, rows).store({name});")
            elif name in sweep.writes():
                self.out.add(f"{name}.store<{self.terms}>(g.{name}, g.state_rows * HEAD_DIM, rows);")

    def _store_outputs(
        self, stage: Stage, stages: tuple[Stage, ...], written: Iterable[str], at_hand: set[str]
    ) -> None:
        """What crosses is where it is asked for already."""
        super()._store_outputs(stage, stages, set(written) - self.crossing.keys(), at_hand)
