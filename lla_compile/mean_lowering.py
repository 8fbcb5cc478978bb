"""The operators that answer with weighted means and solve nothing, softmax attention and Parallax, as sweeps.

Parallax (arXiv 2605.29157) is given its probe r. With p = softmax(scale q.k), a_j = r.(k_j - kbar) and c_j = 1 - a_j:

    o = sum_j p_j c_j v_j = vbar - sum_j p_j a_j v_j

Softmax attention is r = 0, without the products that it leaves out. Backward, with g = dL/do, gamma_j = g.v_j,
gbar = sum_j p_j gamma_j = g.vbar and h_j = gamma_j - gbar:

    sum_j p_j a_j gamma_j = gbar - g.o =: shift      ds_j = p_j (h_j c_j + shift)
    dq = scale sum_j ds_j k_j                        dr = -sum_j p_j h_j k_j
    dk_j = sum_i [scale ds_ij q_i - p_ij h_ij r_i]   dv_j = sum_i p_ij c_ij g_i

so that every number of a row comes from what the forward pass has left, and no sweep of its own.
"""

from __future__ import annotations

from lla_compile.expr import Expr, Kind, dot, log2, row, scalar, tile, vector, where
from lla_compile.sweeps import Accumulator, Assign, P, Score, Sweep, SweepList

_ATTENTION_SCORE = Score("s", "q", "k")
_H_SCORE = Score("h", "grad_out", "v", center="gbar", seeded=True)


def _normalised(out: Expr) -> tuple[Assign, ...]:
    """The end of a forward sweep: the output from ``value_mean``, and lse."""
    row_sum = row("row_sum")
    return (
        Assign("inverse_sum", where(row_sum > 0, 1 / row_sum, 0)),
        Assign("value_mean", vector("value_sum") * row("inverse_sum")),
        Assign("out", out),
        # A row without keys: every weight exp2(s - inf) is 0.
        Assign("lse", where(row_sum > 0, row("row_max") + log2(row_sum), float("inf"))),
    )


def softmax_forward() -> SweepList:
    return SweepList(
        name="softmax_forward",
        stages=(
            Sweep(
                name="attend",
                softmax="online",
                scores=(_ATTENTION_SCORE,),
                accumulators=(Accumulator("value_sum", P, "v"),),
                epilogue=_normalised(vector("value_mean")),
            ),
        ),
        row_inputs=("q",),
        col_inputs=("k", "v"),
        scalars=(),
        row_scalars=(),
        outputs={"out": "input", "lse": "float32"},
        ordinary=("out",),
        value_wide=frozenset({"v", "out", "value_sum", "value_mean"}),
    )


def parallax_forward() -> SweepList:
    """One sweep: the weights enter one product with the values, the weights times a_j another.

    a_j is relative to a mean of those so far, and at the end to r.kbar, so that rounding P a_j costs about what
    rounding P does, whatever offset the keys share.
    """
    return SweepList(
        name="parallax_forward",
        stages=(
            Sweep(
                name="attend",
                softmax="online",
                scores=(_ATTENTION_SCORE, Score("a", "r", "k", mean="probe_mean")),
                accumulators=(
                    Accumulator("value_sum", P, "v"),
                    Accumulator("value_moment", P * tile("a"), "v", about="value_sum"),
                ),
                epilogue=_normalised(vector("value_mean") - vector("value_moment") * row("inverse_sum")),
            ),
        ),
        row_inputs=("q", "r"),
        col_inputs=("k", "v"),
        scalars=(),
        row_scalars=(),
        outputs={"out": "input", "lse": "float32", "probe_mean": "float32", "value_mean": "float32"},
        ordinary=("out",),
        value_wide=frozenset({"v", "out", "value_sum", "value_moment", "value_mean"}),
    )


def softmax_backward() -> SweepList:
    scores = (_ATTENTION_SCORE, _H_SCORE)
    weights = (Assign("ds", P * tile("h")),)
    return SweepList(
        name="softmax_backward",
        stages=(
            Sweep(
                name="grad_q",
                softmax="saved",
                prologue=(Assign("gbar", dot(vector("grad_out"), vector("out"))),),
                scores=scores,
                weights=weights,
                accumulators=(Accumulator("ds_key_sum", tile("ds"), "k"),),
                epilogue=_grad_of_scores(),
            ),
            Sweep(
                name="grad_kv",
                softmax="saved",
                holds="keys",
                scores=scores,
                weights=weights,
                accumulators=(
                    Accumulator("dv", P, "grad_out"),
                    Accumulator("dk", scalar("scale") * tile("ds"), "q"),
                ),
            ),
        ),
        row_inputs=("q", "grad_out", "out"),
        col_inputs=("k", "v"),
        scalars=(),
        row_scalars=(),
        outputs={"dq": "input", "dk": "input", "dv": "input", "dscale": "float32"},
        ordinary=("dq", "dk", "dv"),
        given={"lse": Kind.ROW},
        value_wide=frozenset({"v", "grad_out", "out", "dv"}),
    )


def parallax_backward() -> SweepList:
    # -c_j, as a product that starts at -(1 + r.kbar)
    scores = (_ATTENTION_SCORE, _H_SCORE, Score("minus_c", "r", "k", center="factor_mean", seeded=True))
    weights = (
        Assign("ds", P * (row("shift") - tile("h") * tile("minus_c"))),
        Assign("ph", P * tile("h")),
    )
    return SweepList(
        name="parallax_backward",
        stages=(
            Sweep(
                name="grad_q",
                softmax="saved",
                prologue=(
                    Assign("gbar", dot(vector("grad_out"), vector("value_mean"))),
                    Assign("shift", row("gbar") - dot(vector("grad_out"), vector("out"))),
                    Assign("factor_mean", 1 + row("probe_mean")),
                ),
                scores=scores,
                weights=weights,
                accumulators=(Accumulator("ds_key_sum", tile("ds"), "k"), Accumulator("ph_key_sum", tile("ph"), "k")),
                epilogue=(*_grad_of_scores(), Assign("dr", 0 - vector("ph_key_sum"))),
            ),
            Sweep(
                name="grad_kv",
                softmax="saved",
                holds="keys",
                scores=scores,
                weights=weights,
                accumulators=(
                    Accumulator("dv", 0 - P * tile("minus_c"), "grad_out"),
                    Accumulator("dk", scalar("scale") * tile("ds"), "q"),
                    Accumulator("dk", 0 - tile("ph"), "r"),
                ),
            ),
        ),
        row_inputs=("q", "r", "grad_out", "out"),
        col_inputs=("k", "v"),
        scalars=(),
        row_scalars=(),
        outputs={"dq": "input", "dr": "input", "dk": "input", "dv": "input", "dscale": "float32"},
        ordinary=("dq", "dr", "dk", "dv"),
        given={"lse": Kind.ROW, "probe_mean": Kind.ROW, "value_mean": Kind.VECTOR},
        value_wide=frozenset({"v", "grad_out", "out", "value_mean", "dv"}),
    )


def _grad_of_scores() -> tuple[Assign, ...]:
    return (
        Assign("dq", scalar("scale") * vector("ds_key_sum")),
        Assign("dscale", dot(vector("q"), vector("ds_key_sum"))),
    )
