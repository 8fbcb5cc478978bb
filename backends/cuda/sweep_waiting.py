"""What outlives a sweep and waits while keys are streamed, so that it takes no registers."""

from __future__ import annotations

from typing import Iterable

from lla_compile.expr import Kind
from lla_compile.sweeps import Assign, Loop, Sweep, SweepList


def waiting_vectors(program: SweepList) -> tuple[str, ...]:
    """Vectors that a sweep leaves for a later one, but for those that products take; what every turn of a loop reads and
    writes comes first, to be kept closest."""
    crossing = program.crossing((stage,) for stage in program.stages)
    names = [name for name, kind in crossing.items() if kind is Kind.VECTOR and name not in program.rounded]
    loops = [stage.sweep for stage in program.stages if isinstance(stage, Loop)]
    return tuple(sorted(names, key=lambda name: (-_turns_with(name, loops), name)))


def waiting_rows(program: SweepList) -> tuple[str, ...]:
    """Numbers of rows that outlive a sweep and that no sweep needs while it streams keys."""
    streaming = set().union(*(_read_by_stream(sweep) for sweep in program.sweeps))
    crossing = program.crossing((stage,) for stage in program.stages)
    rows = [*program.row_scalars, *(name for name, kind in crossing.items() if kind is Kind.ROW)]
    return tuple(name for name in rows if name not in streaming)


def _read_by_stream(sweep: Sweep) -> set[str]:
    names = {"lse"} if sweep.softmax == "saved" else set()
    names |= {score.center for score in sweep.scores if score.center}
    return names.union(*(sums.weight.symbols() for sums in sweep.accumulators))


def _turns_with(name: str, loops: Iterable[Sweep]) -> int:
    """How often a turn of the loops touches a vector."""
    return sum((name in sweep.reads()) + (name in sweep.writes()) for sweep in loops)


def made_early(assigns: tuple[Assign, ...], waiting: tuple[str, ...]) -> tuple[Assign, ...]:
    """The same assignments; vectors that go straight to where they wait are made as soon as what they take is there, so
    that they and it leave their registers."""
    ordered: list[Assign] = []
    for number, assign in enumerate(assigns):
        others = (*assigns[:number], *assigns[number + 1 :])
        touched = {other.name for other in others}.union(*(other.value.symbols() for other in others))
        place = len(ordered)
        if assign.name in waiting and assign.name not in touched:
            while place and ordered[place - 1].name not in assign.value.symbols():
                place -= 1
        ordered.insert(place, assign)
    return tuple(ordered)
