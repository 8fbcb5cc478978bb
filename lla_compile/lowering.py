"""Operators of the family as sweeps: the equations, once, for every backend."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from lla_compile import mean_lowering
from lla_compile.expr import Expr, Kind, dot, log2, rounded, row, scalar, sqrt, tile, vector, where, wide_dot
from lla_compile.sweeps import Accumulator, Assign, Loop, P, Score, Sweep, SweepList

_NO_KEYS_LSE = float("inf")  # makes every weight of a row without keys exp2(-inf) = 0


def _start_solve(right: Expr) -> tuple[Assign, ...]:
    """Conjugate gradients (CG) on (C + ridge I) x = ``right`` from x = 0, in normalised form.

    The residual and the direction are kept relative to ||r||, so that their products stay in range in any input type
    however small the residual gets: with rho = ||r||, r = rho*residual and p = rho*direction. The direction is rounded
    before it is used for anything, so that step, residual and solution all speak of the one that C was applied to.
    """
    norm = row("right_norm")
    return (
        Assign("right", right),
        Assign("right_norm", sqrt(dot(vector("right"), vector("right")))),
        Assign("residual", vector("right") * where(norm > 0, 1 / norm, 0)),
        *_next_direction(vector("residual")),
        Assign("solution", vector("right") * 0),
        Assign("rho", row("right_norm")),
        Assign("active", where(norm > 0, 1, 0)),
        Assign("large", row("active")),
        Assign("iterations", norm * 0),
    )


def _next_direction(value: Expr) -> tuple[Assign, Assign]:
    return (
        Assign("direction", rounded(value)),
        Assign("direction_mean", dot(vector("direction"), vector("kbar"))),
    )


def _solve() -> tuple[Loop, Loop]:
    """CG in two loops: products in the tier's precision while a residual is large, rounded once after that.

    Errors of a product matter in proportion to the residual that it is applied to (inexact Krylov methods), so that
    the late iterations need fewer digits. The coarse loop goes on from the direction rounded once.
    """
    entry = _next_direction(vector("direction"))
    return (
        Loop(_cg_step("cg_step"), active="large"),
        Loop(_cg_step("coarse_cg_step"), active="active", coarse=True, entry=entry),
    )


def _cg_step(name: str) -> Sweep:
    """One conjugate-gradient step on (C + ridge I) x = right, with C applied through the keys.

    C is positive semidefinite and ||direction|| >= 1, so the curvature is at least the ridge. Rounding can lose that:
    a row whose curvature falls under half of it, or is not finite, keeps its last iterate.
    """
    direction, residual, active, rho = vector("direction"), vector("residual"), row("active"), row("rho")
    step, growth, goes_on = row("step"), row("growth"), row("step") > 0
    image, curvature = vector("image"), row("curvature")
    usable = (active > 0) & (curvature > 0.5 * row("ridge")) & (curvature < float("inf"))
    return Sweep(
        name=name,
        softmax="saved",
        scores=(Score("s", "q", "k"), Score("t", "direction", "k", center="direction_mean")),
        accumulators=(Accumulator("covariance_direction", P * tile("t"), "k"),),
        epilogue=(
            Assign("image", vector("covariance_direction") + row("ridge") * direction),
            Assign("curvature", dot(direction, image)),
            Assign("step", where(usable, 1 / curvature, 0)),
            Assign("solution", vector("solution") + (step * rho) * direction),
            Assign("residual", where(goes_on, residual - step * image, residual)),
            Assign("growth", where(goes_on, sqrt(dot(residual, residual)), 1)),
            Assign("residual", residual * where(growth > 0, 1 / growth, 0)),
            *_next_direction(where(goes_on, residual + growth * direction, direction)),
            Assign("rho", rho * growth),
            Assign("iterations", row("iterations") + where(goes_on, 1, 0)),
            Assign("unsolved", where(rho > scalar("cg_tol") * row("right_norm"), 1, 0)),
            Assign("active", where(goes_on & (row("iterations") < scalar("cg_max_iters")), row("unsolved"), 0)),
            Assign("large", where(rho > scalar("split_tol") * row("right_norm"), active, 0)),
        ),
    )


def _end_solve(name: str) -> tuple[Assign, ...]:
    """The solution as a rounded unit vector times its norm, ``unit_<name>`` and ``<name>_norm``, and its mean.

    A query that sees fewer keys than it has dimensions has a probe of norm |q|/ridge outside their span, which must
    cancel in u.(k_j - kbar): in float32 that alone costs 1e-5 of the output at ridge 0.1.
    """
    solution, norm, unit = vector("solution"), row(f"{name}_norm"), vector(f"unit_{name}")
    right_norm = row("right_norm")
    return (
        Assign(f"{name}_norm", sqrt(dot(solution, solution))),
        Assign(f"unit_{name}", rounded(solution * where(norm > 0, 1 / norm, 0))),
        Assign(f"{name}_mean", wide_dot(unit, vector("kbar"))),
        Assign("final_residual", row("rho") * where(right_norm > 0, 1 / right_norm, 0)),
    )


_ATTENTION_SCORE = Score("s", "q", "k")
_PROBE_SCORE = Score("a", "unit_probe", "k", center="probe_mean", wide=True)
_C = 1 - row("probe_norm") * tile("a")  # c_j = 1 - u.(k_j - kbar)


def _stats() -> Sweep:
    """Softmax statistics kbar and lse, and the start of the solve for the probe."""
    row_sum, kbar = row("row_sum"), vector("kbar")
    has_keys = row_sum > 0
    return Sweep(
        name="stats",
        softmax="online",
        scores=(_ATTENTION_SCORE,),
        accumulators=(Accumulator("key_sum", P, "k"),),
        epilogue=(
            Assign("kbar", vector("key_sum") * where(has_keys, 1 / row_sum, 0)),
            Assign("lse", where(has_keys, row("row_max") + log2(row_sum), _NO_KEYS_LSE)),
            *_start_solve(where(has_keys, kbar - vector("q"), 0)),
        ),
    )


def _output() -> Sweep:
    """o = sum_j p_j (1 - u.(k_j - kbar)) v_j."""
    return Sweep(
        name="output",
        softmax="saved",
        prologue=_end_solve("probe"),
        scores=(_ATTENTION_SCORE, _PROBE_SCORE),
        accumulators=(Accumulator("out", P * _C, "v"),),
    )


# What the backward pass needs of the forward pass beside its inputs, as the names of both lists of sweeps.
SAVED = {
    "lse": Kind.ROW,
    "kbar": Kind.VECTOR,
    "unit_probe": Kind.VECTOR,
    "probe_norm": Kind.ROW,
    "probe_mean": Kind.ROW,
}
INFO = {"iterations": "int32", "final_residual": "float32"}


# With h_j = gamma_j - b_j - gbar the factor of every weight is c_j or h_j:
#     e_j - gbar = h_j c_j      ds_j = p_j (h_j c_j + gbar - ebar)      gbar - ebar = ridge (u.s) =: shift
_GAMMA_SCORE = Score("gamma", "grad_out", "v")
_ADJOINT_SCORE = Score("b", "unit_adjoint", "k", center="adjoint_mean", wide=True)
_BACKWARD_SCORES = (_ATTENTION_SCORE, _GAMMA_SCORE, _PROBE_SCORE, _ADJOINT_SCORE)
_PC, _PH = tile("pc"), tile("ph")
_BACKWARD_WEIGHTS = (
    Assign("c", _C),
    Assign("h", tile("gamma") - (row("adjoint_norm") * tile("b") + row("gbar"))),
    Assign("ds", P * (tile("h") * tile("c") + row("shift"))),
    Assign("pc", P * tile("c")),
    Assign("ph", P * tile("h")),
)


def _adjoint_stats() -> Sweep:
    """gbar and t = sum_j p_j gamma_j (k_j - kbar), and the start of the adjoint solve (C + ridge I) s = t."""
    return Sweep(
        name="adjoint_stats",
        softmax="saved",
        scores=(_ATTENTION_SCORE, _GAMMA_SCORE),
        accumulators=(Accumulator("gamma_key_sum", P * tile("gamma"), "k", row_sum="gbar"),),
        epilogue=_start_solve(vector("gamma_key_sum") - row("gbar") * vector("kbar")),
    )


def _grad_q() -> Sweep:
    """dq = scale sum_j ds_j k_j + s, and the row sums of the gradients of ridge and scale.

    sum_j ds_j = 0 holds exactly only for exact solves and products. What is left of it, ds_sum, goes back into the
    shift, so that it holds for the weights that were used, and an offset that all keys share drops out of dq.
    """
    centred = vector("ds_key_sum") - row("ds_sum") * vector("kbar")
    adjoint = row("adjoint_norm") * vector("unit_adjoint")
    return Sweep(
        name="grad_q",
        softmax="saved",
        prologue=(
            *_end_solve("adjoint"),
            Assign(
                "dridge", row("probe_norm") * row("adjoint_norm") * dot(vector("unit_probe"), vector("unit_adjoint"))
            ),
            Assign("shift", row("ridge") * row("dridge")),
        ),
        scores=_BACKWARD_SCORES,
        weights=_BACKWARD_WEIGHTS,
        accumulators=(Accumulator("ds_key_sum", tile("ds"), "k", row_sum="ds_sum"),),
        epilogue=(
            Assign("dq", scalar("scale") * centred + adjoint),
            Assign("dscale", dot(vector("q"), centred)),
            Assign("shift", row("shift") - row("ds_sum")),
        ),
    )


def _grad_kv() -> Sweep:
    """dk_j = sum_i [scale ds_ij q_i - p_ij h_ij u_i - p_ij c_ij s_i] and dv_j = sum_i p_ij c_ij g_i."""
    return Sweep(
        name="grad_kv",
        softmax="saved",
        holds="keys",
        scores=_BACKWARD_SCORES,
        weights=_BACKWARD_WEIGHTS,
        accumulators=(
            Accumulator("dv", _PC, "grad_out"),
            Accumulator("dk", scalar("scale") * tile("ds"), "q"),
            Accumulator("dk", (0 - row("probe_norm")) * _PH, "unit_probe"),
            Accumulator("dk", (0 - row("adjoint_norm")) * _PC, "unit_adjoint"),
        ),
    )


def _lla_forward() -> SweepList:
    return SweepList(
        name="lla_forward",
        stages=(_stats(), *_solve(), _output()),
        row_inputs=("q",),
        col_inputs=("k", "v"),
        scalars=("cg_tol", "split_tol", "cg_max_iters"),
        row_scalars=("ridge",),
        outputs={"out": "input"} | INFO | dict.fromkeys(SAVED, "float32"),
        ordinary=("out",),
        value_wide=frozenset({"v", "out"}),
    )


def _lla_decode() -> SweepList:
    forward = _lla_forward()
    return replace(
        forward,
        name="lla_decode",
        stages=(*forward.stages[:-1], _normalised(forward.stages[-1])),
        outputs={name: forward.outputs[name] for name in ("out", *INFO)},
    )


def _normalised(output: Sweep) -> Sweep:
    """The output over sum_j p_j c_j, which is 1 but for rounding: what errors of the c_j have in common drops out.

    A query of one or two keys has a probe of norm |k - q|/ridge, and every c_j the error of its product with the mean.
    """
    (total,), weight_sum = output.accumulators, row("weight_sum")
    return replace(
        output,
        accumulators=(replace(total, row_sum="weight_sum"),),
        epilogue=(Assign("out", vector("out") * where(weight_sum > 0.5, 1 / weight_sum, 1)),),
    )


def _lla_backward() -> SweepList:
    forward = lower("lla", "forward")
    return SweepList(
        name="lla_backward",
        stages=(_adjoint_stats(), *_solve(), _grad_q(), _grad_kv()),
        row_inputs=("q", "grad_out"),
        col_inputs=("k", "v"),
        scalars=("cg_tol", "split_tol", "cg_max_iters"),
        row_scalars=("ridge",),
        outputs={"dq": "input", "dk": "input", "dv": "input", "dridge": "float32", "dscale": "float32"} | INFO,
        ordinary=("dq", "dk", "dv", "dridge"),
        given=SAVED,
        given_rounded=forward.rounded & SAVED.keys(),
        given_wide=forward.wide & SAVED.keys(),
        value_wide=frozenset({"v", "grad_out", "dv"}),
    )


_LOWERINGS = {
    ("lla", "forward"): _lla_forward,
    ("lla", "backward"): _lla_backward,
    ("lla", "decode"): _lla_decode,
    ("parallax", "forward"): mean_lowering.parallax_forward,
    ("parallax", "backward"): mean_lowering.parallax_backward,
    ("parallax", "decode"): lambda: _decoding("parallax"),
    ("softmax", "forward"): mean_lowering.softmax_forward,
    ("softmax", "backward"): mean_lowering.softmax_backward,
    ("softmax", "decode"): lambda: _decoding("softmax"),
}


def _decoding(op: str) -> SweepList:
    """Decoding of an operator that reads the keys once: the forward sweep, for nothing but the output."""
    return replace(lower(op, "forward").wanting(("out",)), name=f"{op}_decode")


@lru_cache(maxsize=None)
def lower(op: str, phase: str) -> SweepList:
    """The sweeps of an operator.

    ``("lla", "forward")`` is stats, cg_step*, output; ``("lla", "backward")`` is adjoint_stats, cg_step*, grad_q,
    grad_kv; ``("lla", "decode")`` is that of "forward", without what a backward pass would need. "parallax" and
    "softmax" are attend; grad_q, grad_kv; and attend.

    Raises:
        NotImplementedError: no lowering is known for this operator and phase.
    """
    try:
        return _LOWERINGS[op, phase]()
    except KeyError:
        known = ", ".join(" ".join(key) for key in _LOWERINGS)
        raise NotImplementedError(f"no lowering for op {op!r}, phase {phase!r}; known: {known}") from None
