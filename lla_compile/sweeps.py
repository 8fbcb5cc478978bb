"""The intermediate representation: an operator as a short list of sweeps, described by data.

A *sweep* holds a tile of one side, query rows or keys, and streams every visible tile of the other side past it. Per
pair of tiles it forms *scores* (tile products of a row operand with a key-side operand), turns them into *weights*
(element-wise expressions) and adds weighted operands to *accumulators*. Before and after the stream, *prologue* and
*epilogue* update the row state by row-wise assignments.

Everything that a backend has to know is here: the eager backend interprets these objects, the others print them.
Names that start a row's life in one sweep and are read in a later one are the *state* that crosses sweeps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Iterable, Mapping

from lla_compile.expr import Expr, Kind, tile

# exp2(score - lse): the softmax weight of a pair, available to every weight expression.
P = tile("p")


@dataclass(frozen=True)
class Score:
    """Tile product ``name[i, j] = row[i] . col[j] - center[i]``; no ``center`` means plain ``row[i] . col[j]``.

    ``row`` names an input or a ``rounded`` vector, so that the product takes it exactly; ``col`` an input on the key
    side; ``center`` a ROW, the product of the same rounded vector with kbar: what is left stays small where key and
    kbar are close. ``wide`` says that the terms of the product cancel and asks for the widest type of the tier.

    ``seeded`` has the product's sum start at -center: for centres that no more than the product itself cancels against.

    ``mean`` names a ROW that an "online" sweep keeps while it streams and that ends as the mean of the product under
    all weights. The score is relative to it, to a weighted mean of products of the first tile on: a backend is free to
    move it with every tile or when it rescales, and what earlier tiles have left in the accumulators ``about`` others
    is moved along.
    """

    name: str
    row: str
    col: str
    center: str | None = None
    wide: bool = False
    mean: str | None = None
    seeded: bool = False


@dataclass(frozen=True)
class Accumulator:
    """``name[i] = sum_j weight[i, j] * operand[j]``, summed over the streamed side.

    Accumulators of one name add up. ``row_sum`` also names the sum of the weights themselves, as the product rounds
    them: with it the epilogue can take a shared offset of the operands out exactly.

    ``about`` names the accumulator of the same operand with weight P, where this one's weight is P times a score with
    a running ``mean``: when the mean moves by d, this sum loses d times that one.
    """

    name: str
    weight: Expr
    operand: str
    row_sum: str | None = None
    about: str | None = None


@dataclass(frozen=True)
class Assign:
    """``name = value`` for every row, or in a sweep's ``weights`` for every pair."""

    name: str
    value: Expr


@dataclass(frozen=True)
class Sweep:
    """One pass over the visible pairs.

    Attributes:
        name: what the sweep is called in plans, profiles and generated code.
        softmax: "online" keeps a running maximum and sum of the first score and offers them to the epilogue as
            ``row_max`` and ``row_sum``; accumulators are then relative to ``exp2(row_max)``. "saved" takes the weights
            from ``lse``, which an earlier sweep left in the state.
        scores: the tile products; the first is the attention score, scaled to base 2.
        accumulators: the weighted sums.
        weights: TILE expressions that accumulators share.
        prologue: row-wise assignments before the stream.
        epilogue: row-wise assignments after it.
        holds: "rows" or "keys": the side whose tile stays while the other is streamed. A sweep that holds keys has
            neither prologue nor epilogue, and sums over the query heads of a group.
    """

    name: str
    softmax: str
    scores: tuple[Score, ...]
    accumulators: tuple[Accumulator, ...]
    weights: tuple[Assign, ...] = ()
    prologue: tuple[Assign, ...] = ()
    epilogue: tuple[Assign, ...] = ()
    holds: str = "rows"

    @property
    def streams(self) -> bool:
        """Whether anything is summed over the stream; what is left of a reduced sweep may be row-wise alone."""
        return bool(self.accumulators) or self.softmax == "online"

    @property
    def products(self) -> int:
        """Tile products, that is multiply-adds per visible pair and column of the operands."""
        return len(self.scores) + len(self.accumulators)

    @property
    def products_operands(self) -> tuple[str, ...]:
        """The operand of each tile product whose width decides its cost."""
        return (*(s.col for s in self.scores), *(a.operand for a in self.accumulators))

    def stream_reads(self) -> frozenset[str]:
        """State that must exist before the stream: what the prologue, the products and the weights use."""
        known = {s.name for s in self.scores} | {"p"}
        needed: set[str] = set() if self.softmax == "online" else {"lse"}
        for assign in (*self.prologue, *self.weights):
            needed |= assign.value.symbols() - known
            known.add(assign.name)
        for score in self.scores:
            needed |= {score.row, score.center} - {None} - known
        for accumulator in self.accumulators:
            needed |= accumulator.weight.symbols() - known
            if self.holds == "keys":
                needed.add(accumulator.operand)
        return frozenset(needed)

    def reads(self) -> frozenset[str]:
        """State that must exist before the sweep, its epilogue included."""
        known = {a.name for a in self.prologue} | self.sums() | self.means()
        if self.softmax == "online":
            known |= {"row_max", "row_sum"}
        needed = set(self.stream_reads())
        for assign in self.epilogue:
            needed |= assign.value.symbols() - known
            known.add(assign.name)
        return frozenset(needed)

    def sums(self) -> frozenset[str]:
        """Names of the accumulators and of their row sums."""
        return frozenset(x for a in self.accumulators for x in (a.name, a.row_sum) if x)

    def means(self) -> frozenset[str]:
        """Names of the running means of scores."""
        return frozenset(s.mean for s in self.scores if s.mean)

    def writes(self) -> dict[str, Kind]:
        """What the sweep assigns, with kinds: prologue, accumulators, means and epilogue."""
        kinds = {a.name: a.value.kind for a in self.prologue} | dict.fromkeys(self.means(), Kind.ROW)
        kinds |= {a.name: Kind.VECTOR for a in self.accumulators}
        kinds |= {a.row_sum: Kind.ROW for a in self.accumulators if a.row_sum}
        return kinds | {a.name: a.value.kind for a in self.epilogue}

    def only(self, live: frozenset[str]) -> tuple[Sweep | None, frozenset[str]]:
        """The part of the sweep that ``live`` depends on, and what that part depends on in turn.

        Returns:
            The reduced sweep, None if it writes nothing of ``live``; and the names that are live before it.
        """
        if not live & self.writes().keys():
            return None, live
        epilogue, after_stream = _needed(self.epilogue, live)
        after_stream |= {a.about for a in self.accumulators if a.about and a.name in after_stream}
        sums = tuple(a for a in self.accumulators if {a.name, a.row_sum} & after_stream)
        used = after_stream - self.sums() - self.means() - {"row_max", "row_sum"}
        in_stream = frozenset().union(*(a.weight.symbols() for a in sums))
        weights, in_stream = _needed(self.weights, in_stream)
        needed = in_stream | after_stream
        scores = tuple(s for i, s in enumerate(self.scores) if i == 0 or {s.name, s.mean} & needed)
        reduced = replace(self, scores=scores, accumulators=sums, weights=weights, prologue=(), epilogue=epilogue)
        prologue, used = _needed(self.prologue, used | reduced.stream_reads())
        return replace(reduced, prologue=prologue), used


def _needed(assigns: tuple[Assign, ...], live: frozenset[str]) -> tuple[tuple[Assign, ...], frozenset[str]]:
    """The assignments that ``live`` depends on, and what is live before them."""
    kept = []
    for assign in reversed(assigns):
        if assign.name in live:
            kept.append(assign)
            live = (live - {assign.name}) | assign.value.symbols()
    return tuple(reversed(kept)), live


@dataclass(frozen=True)
class Loop:
    """Repeat ``sweep`` until no row of the tile has ``active`` > 0.

    Attributes:
        sweep: the body.
        active: the flag.
        coarse: ``rounded`` and the weights of products are one term here, whatever the tier.
        entry: row-wise assignments before the first turn, which change nothing when they are repeated.
    """

    sweep: Sweep
    active: str
    coarse: bool = False
    entry: tuple[Assign, ...] = ()

    def reads(self) -> frozenset[str]:
        """State that must exist before the loop."""
        needed, known = {self.active}, set()
        for assign in self.entry:
            needed |= assign.value.symbols() - known
            known.add(assign.name)
        return frozenset(needed) | (self.sweep.reads() - known)

    def writes(self) -> dict[str, Kind]:
        return {a.name: a.value.kind for a in self.entry} | self.sweep.writes()


Stage = Sweep | Loop


def sweep_of(stage: Stage) -> Sweep:
    return stage.sweep if isinstance(stage, Loop) else stage


@dataclass(frozen=True)
class SweepList:
    """A lowered operator.

    Attributes:
        name: the operator and phase.
        stages: sweeps and loops in order of execution; those that hold keys come last.
        row_inputs: tensors read per query row, in the input type.
        col_inputs: tensors read per key, in the input type.
        scalars: numbers that are the same for every row, from the plan.
        row_scalars: given per row in float32.
        outputs: what can be asked for, with the type that it is stored in: "input", "float32" or "int32". A name that
            is ``rounded`` is stored as the terms that its value is the sum of.
        ordinary: the outputs of an ordinary call: what is tuned, and compiled ahead.
        given: state that another list of the operator has left, with kinds.
        given_rounded, given_wide: those of ``given`` that are ``rounded`` and ``wide``.
        value_wide: names as wide as the value, where all others are as wide as the query.
    """

    name: str
    stages: tuple[Stage, ...]
    row_inputs: tuple[str, ...]
    col_inputs: tuple[str, ...]
    scalars: tuple[str, ...]
    row_scalars: tuple[str, ...]
    outputs: Mapping[str, str]
    ordinary: tuple[str, ...]
    given: Mapping[str, Kind] = field(default_factory=dict)
    given_rounded: frozenset[str] = frozenset()
    given_wide: frozenset[str] = frozenset()
    value_wide: frozenset[str] = frozenset({"v"})

    @property
    def sweeps(self) -> tuple[Sweep, ...]:
        """The distinct sweeps in order."""
        return tuple(map(sweep_of, self.stages))

    @cached_property
    def kinds(self) -> Mapping[str, Kind]:
        """Every name that is given or that some sweep assigns, with its kind."""
        kinds = dict(self.given)
        for sweep in self.sweeps:
            kinds |= sweep.writes()
        return kinds

    @cached_property
    def row_operands(self) -> tuple[str, ...]:
        """The inputs that tile products take rows of; what is left is read once, row by row."""
        used = {score.row for sweep in self.sweeps for score in sweep.scores}
        return tuple(name for name in self.row_inputs if name in used)

    @cached_property
    def rounded(self) -> frozenset[str]:
        """Names whose every value is ``rounded``: a backend may keep them in the input type."""
        assigns = [a for s in self.sweeps for a in (*s.prologue, *s.epilogue)]
        return self.given_rounded | {a.name for a in assigns if a.value.op == "rounded"}

    @cached_property
    def wide(self) -> frozenset[str]:
        """Names that keep the widest type of the tier, where large terms cancel against them."""
        assigns = [a for s in self.sweeps for a in (*s.prologue, *s.epilogue)]
        return self.given_wide | {a.name for a in assigns if a.value.op == "wide_dot"}

    @cached_property
    def refines(self) -> bool:
        """Whether a coarse loop goes on where another has stopped; it does all where operands are one term anyway."""
        return any(isinstance(stage, Loop) and stage.coarse for stage in self.stages)

    @cached_property
    def key_outputs(self) -> frozenset[str]:
        """The outputs with a row for every key instead of every query."""
        held = frozenset().union(*(s.sums() for s in self.sweeps if s.holds == "keys"))
        return held & self.outputs.keys()

    def crossing(self, parts: Iterable[tuple[Stage, ...]]) -> dict[str, Kind]:
        """What one of ``parts`` (stages that share a launch) leaves for another, or a lone loop for its next turn."""
        parts = tuple(parts)
        reads = [frozenset().union(*(stage.reads() for stage in part)) for part in parts]
        crosses: dict[str, Kind] = {}
        for number, part in enumerate(parts):
            lone_loop = len(part) == 1 and isinstance(part[0], Loop)
            others = reads if lone_loop else reads[number + 1 :]
            read = frozenset().union(*others)
            for stage in part:
                crosses |= {name: kind for name, kind in stage.writes().items() if name in read}
        return crosses

    def one_sum_a_sweep(self) -> SweepList:
        """The list with a sweep of its own for every result of a sweep that holds keys: more products, fewer sums."""
        stages: list[Stage] = []
        for stage in self.stages:
            if isinstance(stage, Loop) or stage.holds == "rows":
                stages.append(stage)
                continue
            for name in stage.writes():
                part, _ = stage.only(frozenset({name}))
                stages.append(replace(part, name=f"{stage.name}_{name}"))
        return replace(self, stages=tuple(stages))

    def products(self, iterations: float) -> float:
        """Tile products of the whole list when its loops turn ``iterations`` times in all."""
        outside = sum(s.products for s in self.stages if isinstance(s, Sweep))
        return outside + iterations * max((s.sweep.products for s in self.stages if isinstance(s, Loop)), default=0)

    @lru_cache(maxsize=None)  # noqa: B019: the lists of the operators live as long as the process
    def wanting(self, names: tuple[str, ...]) -> SweepList:
        """The part of the list that the outputs ``names`` depend on.

        Raises:
            ValueError: a name is not among the outputs.
        """
        if unknown := sorted(set(names) - self.outputs.keys()):
            raise ValueError(f"{self.name} has no output {', '.join(unknown)}; it has {', '.join(self.outputs)}")
        live, stages = frozenset(names), []
        for stage in reversed(self.stages):
            kept, live = _only(stage, live)
            if kept is not None:
                stages.append(kept)
        stages = tuple(reversed(stages))
        return replace(
            self,
            stages=stages,
            outputs={name: dtype for name, dtype in self.outputs.items() if name in names},
            given={name: kind for name, kind in self.given.items() if name in live},
            given_rounded=self.given_rounded & live,
            given_wide=self.given_wide & live,
        )

    def __hash__(self):
        return id(self)

    def __eq__(self, other):
        return self is other


def _only(stage: Stage, live: frozenset[str]) -> tuple[Stage | None, frozenset[str]]:
    """:meth:`Sweep.only` of a stage; a loop hands its own results on to its next turn, or is never entered."""
    if not isinstance(stage, Loop):
        return stage.only(live)
    if not live & stage.sweep.writes().keys():
        return None, live
    live |= {stage.active}
    while True:
        kept, before = stage.sweep.only(live)
        if before <= live:
            break
        live |= before
    entry, before = _needed(stage.entry, live)
    return replace(stage, sweep=kept, entry=entry), live | before
