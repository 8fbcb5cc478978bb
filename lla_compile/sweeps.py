"""The intermediate representation: an operator as a short list of sweeps, described by data.

A *sweep* streams every visible key tile past a tile of query rows. Per pair of tiles it forms *scores* (tile products
of a row operand with a key-side operand), turns them into weights (element-wise expressions) and adds weighted columns
to *accumulators*. Before and after the stream, *prologue* and *epilogue* update the row state by row-wise assignments.

Everything that a backend has to know is here: the eager backend interprets these objects, the others print them.
Names that start a row's life in one sweep and are read in a later one are the *state* that crosses sweeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lla_compile.expr import Expr, Kind, dot, log2, rounded, row, scalar, sqrt, tile, vector, where, wide_dot

# exp2(score - lse): the softmax weight of a pair, available to every weight expression.
P = tile("p")


@dataclass(frozen=True)
class Score:
    """Tile product ``name[i, j] = row[i] . col[j] - center[i]``; no ``center`` means plain ``row[i] . col[j]``.

    ``row`` names an input or a ``rounded`` vector, so that the product takes it exactly; ``col`` an input on the key
    side; ``center`` a ROW, the product of the same rounded vector with kbar: what is left stays small where key and
    kbar are close. ``wide`` says that the terms of the product cancel and asks for the widest type of the tier.
    """

    name: str
    row: str
    col: str
    center: str | None = None
    wide: bool = False


@dataclass(frozen=True)
class Accumulator:
    """``name[i] = sum_j weight[i, j] * col[j]``."""

    name: str
    weight: Expr
    col: str


@dataclass(frozen=True)
class Assign:
    """``name = value`` for every row; ``value`` is a ROW or a VECTOR."""

    name: str
    value: Expr


@dataclass(frozen=True)
class Sweep:
    """One pass over the visible keys.

    Attributes:
        name: what the sweep is called in plans, profiles and generated code.
        softmax: "online" keeps a running maximum and sum of the first score and offers them to the epilogue as
            ``row_max`` and ``row_sum``; accumulators are then relative to ``exp2(row_max)``. "saved" takes the weights
            from ``lse``, which an earlier sweep left in the state.
        scores: the tile products; the first is the attention score, scaled to base 2.
        accumulators: the weighted sums.
        prologue: row-wise assignments before the stream.
        epilogue: row-wise assignments after it.
    """

    name: str
    softmax: str
    scores: tuple[Score, ...]
    accumulators: tuple[Accumulator, ...]
    prologue: tuple[Assign, ...] = ()
    epilogue: tuple[Assign, ...] = ()

    @property
    def products(self) -> int:
        """Tile products, that is multiply-adds per visible pair and column of the operands."""
        return len(self.scores) + len(self.accumulators)

    def stream_reads(self) -> frozenset[str]:
        """State that must exist before the stream: what the prologue, the scores and the weights use."""
        known = {s.name for s in self.scores} | {"p"}
        needed: set[str] = set() if self.softmax == "online" else {"lse"}
        for assign in self.prologue:
            needed |= assign.value.symbols() - known
            known.add(assign.name)
        for score in self.scores:
            needed |= {score.row, score.center} - {None} - known
        for accumulator in self.accumulators:
            needed |= accumulator.weight.symbols() - known
        return frozenset(needed)

    def reads(self) -> frozenset[str]:
        """State that must exist before the sweep, its epilogue included."""
        known = {a.name for a in (*self.prologue, *self.accumulators)}
        if self.softmax == "online":
            known |= {"row_max", "row_sum"}
        needed = set(self.stream_reads())
        for assign in self.epilogue:
            needed |= assign.value.symbols() - known
            known.add(assign.name)
        return frozenset(needed)

    def writes(self) -> dict[str, Kind]:
        """What the sweep assigns, with kinds: prologue, accumulators and epilogue."""
        kinds = {a.name: a.value.kind for a in self.prologue}
        kinds |= {a.name: Kind.VECTOR for a in self.accumulators}
        return kinds | {a.name: a.value.kind for a in self.epilogue}


@dataclass(frozen=True)
class Loop:
    """Repeat ``sweep`` until no row of the tile has ``active`` > 0, at most ``cg_max_iters`` times."""

    sweep: Sweep
    active: str


@dataclass(frozen=True)
class SweepList:
    """A lowered operator.

    Attributes:
        name: the operator and phase.
        stages: sweeps and loops in order of execution.
        row_inputs: tensors read per query row, in the input type.
        col_inputs: tensors streamed per key, in the input type.
        scalars: numbers that are the same for every row.
        row_scalars: given per row in float32.
        outputs: state written in the input type at the end.
        info: state written on request, for diagnosis.
    """

    name: str
    stages: tuple[Sweep | Loop, ...]
    row_inputs: tuple[str, ...]
    col_inputs: tuple[str, ...]
    scalars: tuple[str, ...]
    row_scalars: tuple[str, ...]
    outputs: tuple[str, ...]
    info: tuple[str, ...]

    @property
    def sweeps(self) -> tuple[Sweep, ...]:
        """The distinct sweeps in order."""
        return tuple(s.sweep if isinstance(s, Loop) else s for s in self.stages)

    def kinds(self) -> dict[str, Kind]:
        """Every name that some sweep assigns, with its kind."""
        kinds: dict[str, Kind] = {}
        for sweep in self.sweeps:
            kinds |= sweep.writes()
        return kinds

    def rounded(self) -> frozenset[str]:
        """Names whose every value is ``rounded``: a backend may keep them in the input type."""
        assigns = [a for s in self.sweeps for a in (*s.prologue, *s.epilogue)]
        return frozenset(a.name for a in assigns if a.value.op == "rounded")

    def state(self) -> dict[str, Kind]:
        """What one sweep leaves for a later one (or for its own next turn), with kinds."""
        read = frozenset().union(*(s.reads() for s in self.sweeps))
        return {name: kind for name, kind in self.kinds().items() if name in read}

    def products(self, iterations: float) -> float:
        """Tile products of the whole list when its loops turn ``iterations`` times."""
        return sum(s.sweep.products * iterations if isinstance(s, Loop) else s.products for s in self.stages)


_NO_KEYS_LSE = float("inf")  # makes every weight of a row without keys exp2(-inf) = 0


def _stats() -> Sweep:
    """Softmax statistics: kbar and lse; then CG from u = 0 in normalised form.

    The residual and the direction are kept relative to ||r||, so that their products stay in range in any input type
    however small the residual gets: with rho = ||r||, r = rho*residual and p = rho*direction. The direction is rounded
    before it is used for anything, so that step, residual and probe all speak of the one that C was applied to.
    """
    row_sum, kbar = row("row_sum"), vector("kbar")
    has_keys = row_sum > 0
    delta, delta_norm = vector("delta"), row("delta_norm")
    return Sweep(
        name="stats",
        softmax="online",
        scores=(Score("s", "q", "k"),),
        accumulators=(Accumulator("key_sum", P, "k"),),
        epilogue=(
            Assign("kbar", vector("key_sum") * where(has_keys, 1 / row_sum, 0)),
            Assign("lse", where(has_keys, row("row_max") + log2(row_sum), _NO_KEYS_LSE)),
            Assign("delta", where(has_keys, kbar - vector("q"), 0)),
            Assign("delta_norm", sqrt(dot(delta, delta))),
            Assign("residual", delta * where(delta_norm > 0, 1 / delta_norm, 0)),
            *_next_direction(vector("residual")),
            Assign("probe", delta * 0),
            Assign("rho", row("delta_norm")),
            Assign("active", where(delta_norm > 0, 1, 0)),
            Assign("iterations", delta_norm * 0),
        ),
    )


def _next_direction(value: Expr) -> tuple[Assign, Assign]:
    return (
        Assign("direction", rounded(value)),
        Assign("direction_mean", dot(vector("direction"), vector("kbar"))),
    )


def _cg_step() -> Sweep:
    """One conjugate-gradient step on (C + ridge I) u = kbar - q, with C applied through the keys.

    C is positive semidefinite and ||direction|| >= 1, so the curvature is at least the ridge. Rounding can lose that:
    a row whose curvature falls under half of it, or is not finite, keeps its last iterate.
    """
    direction, residual, active, rho = vector("direction"), vector("residual"), row("active"), row("rho")
    step, growth, goes_on = row("step"), row("growth"), row("step") > 0
    image, curvature = vector("image"), row("curvature")
    usable = (active > 0) & (curvature > 0.5 * row("ridge")) & (curvature < float("inf"))
    return Sweep(
        name="cg_step",
        softmax="saved",
        scores=(Score("s", "q", "k"), Score("t", "direction", "k", center="direction_mean")),
        accumulators=(Accumulator("covariance_direction", P * tile("t"), "k"),),
        epilogue=(
            Assign("image", vector("covariance_direction") + row("ridge") * direction),
            Assign("curvature", dot(direction, image)),
            Assign("step", where(usable, 1 / curvature, 0)),
            Assign("probe", vector("probe") + (step * rho) * direction),
            Assign("residual", where(goes_on, residual - step * image, residual)),
            Assign("growth", where(goes_on, sqrt(dot(residual, residual)), 1)),
            Assign("residual", residual * where(growth > 0, 1 / growth, 0)),
            *_next_direction(where(goes_on, residual + growth * direction, direction)),
            Assign("rho", rho * growth),
            Assign("active", where(goes_on & (rho > scalar("cg_tol") * row("delta_norm")), 1, 0)),
            Assign("iterations", row("iterations") + where(goes_on, 1, 0)),
        ),
    )


def _output() -> Sweep:
    """o = sum_j p_j (1 - u.(k_j - kbar)) v_j, with u as a unit vector times its norm.

    A query that sees fewer keys than it has dimensions has a probe of norm |q|/ridge outside their span, which must
    cancel in u.(k_j - kbar): in float32 that alone costs 1e-5 of the output at ridge 0.1.
    """
    probe, norm = vector("probe"), row("probe_norm")
    return Sweep(
        name="output",
        softmax="saved",
        prologue=(
            Assign("probe_norm", sqrt(dot(probe, probe))),
            Assign("unit_probe", rounded(probe * where(norm > 0, 1 / norm, 0))),
            Assign("probe_mean", wide_dot(vector("unit_probe"), vector("kbar"))),
        ),
        scores=(Score("s", "q", "k"), Score("a", "unit_probe", "k", center="probe_mean", wide=True)),
        accumulators=(Accumulator("out", P * (1 - norm * tile("a")), "v"),),
        epilogue=(Assign("final_residual", row("rho") * where(row("delta_norm") > 0, 1 / row("delta_norm"), 0)),),
    )


@lru_cache(maxsize=None)
def lower(op: str, phase: str) -> SweepList:
    """The sweeps of an operator: ``("lla", "forward")`` is stats, cg_step*, output.

    Raises:
        NotImplementedError: no lowering is known for this operator and phase.
    """
    if (op, phase) != ("lla", "forward"):
        raise NotImplementedError(f"no lowering for op {op!r}, phase {phase!r}; known: lla forward")
    return SweepList(
        name="lla_forward",
        stages=(_stats(), Loop(_cg_step(), active="active"), _output()),
        row_inputs=("q",),
        col_inputs=("k", "v"),
        scalars=("cg_tol",),
        row_scalars=("ridge",),
        outputs=("out",),
        info=("iterations", "final_residual"),
    )
