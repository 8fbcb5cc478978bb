"""The kernels that sweeps become: which stages share a launch, what is in memory meanwhile, and what is printed."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Mapping

from lla_compile.backends.cuda.split_source import PartPrinter
from lla_compile.backends.cuda.sweep_arguments import LOOP_FIELD, Field, argument_fields
from lla_compile.backends.cuda.sweep_source import SweepsPrinter
from lla_compile.backends.cuda.sweep_waiting import waiting_rows, waiting_vectors
from lla_compile.lowering import lower
from lla_compile.sweeps import Loop, Stage, SweepList


@dataclass(frozen=True)
class Part:
    """A kernel.

    Attributes:
        stages: that it runs; where they are loops alone, a launch is one turn of them.
        headers: what is printed, by the names that the written sources include it by.
    """

    stages: tuple[Stage, ...]
    headers: Mapping[str, str]

    @property
    def repeats(self) -> bool:
        return isinstance(self.stages[0], Loop)


@dataclass(frozen=True)
class Source:
    """What is printed for an operator's pass under a schedule.

    Attributes:
        parts: in order of launch.
        fields: of the arguments, in order.
        program: the sweeps.
        waiting: vectors that wait while keys are streamed, in order of their slots.
        waiting_rows: the same of numbers of rows.
        state: what is in memory whether it is asked for or not: of one part the vectors that wait, unless they are
            parked; of several all that crosses them, these vectors first.
    """

    parts: tuple[Part, ...]
    fields: tuple[Field, ...]
    program: SweepList
    waiting: tuple[str, ...]
    waiting_rows: tuple[str, ...]
    state: tuple[str, ...]

    @property
    def arguments(self) -> struct.Struct:
        return struct.Struct("".join(field.format for field in self.fields))


@lru_cache(maxsize=None)
def print_sweeps(op: str, phase: str, schedule: str = "fused") -> Source:
    """The CUDA C++ of an operator's sweeps; all of them have to hold query rows.

    In ``fused`` one part has all stages. In ``split`` each sweep is a part, and so is a turn of the loops that follow
    each other, whichever of them a group of rows is in.
    """
    program = lower(op, phase)
    waiting, rows = waiting_vectors(program), waiting_rows(program)
    groups = loops_together(program)
    if schedule == "fused":
        fields = argument_fields(program, waiting)
        printer = SweepsPrinter(program, waiting, rows, groups)
        parts = (Part(program.stages, printer.headers(fields)),)
        return Source(parts, fields, program, waiting, rows, waiting)
    crossing = program.crossing(groups)
    state = tuple(dict.fromkeys((*waiting, *crossing)))
    fields = (*argument_fields(program, state), LOOP_FIELD)
    parts = tuple(
        Part(stages, PartPrinter(program, waiting, rows, stages, then, crossing).headers(fields))
        for stages, then in zip(groups, (*groups[1:], ()))
    )
    return Source(parts, fields, program, waiting, rows, state)


def loops_together(program: SweepList) -> tuple[tuple[Stage, ...], ...]:
    """Stages in order; loops that follow each other take turns of one loop, as groups of rows need them."""
    groups: list[tuple[Stage, ...]] = []
    for stage in program.stages:
        if groups and isinstance(stage, Loop) and isinstance(groups[-1][0], Loop):
            groups[-1] += (stage,)
        else:
            groups.append((stage,))
    return tuple(groups)
