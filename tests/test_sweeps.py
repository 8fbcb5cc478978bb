"""The intermediate representation: names flow from sweep to sweep, and the work is what the equations need."""

import pytest

from lla_compile.expr import Kind
from lla_compile.sweeps import Loop, lower

LLA = lower("lla", "forward")
STATS, CG_STEP, OUTPUT = LLA.sweeps


def inputs() -> set[str]:
    return {*LLA.row_inputs, *LLA.col_inputs, *LLA.scalars, *LLA.row_scalars}


def test_lla_forward_is_stats_cg_output():
    assert [sweep.name for sweep in LLA.sweeps] == ["stats", "cg_step", "output"]
    assert isinstance(LLA.stages[1], Loop) and LLA.stages[1].active == "active"
    assert [sweep.softmax for sweep in LLA.sweeps] == ["online", "saved", "saved"]


def test_every_name_that_is_read_was_written_before():
    known = inputs()
    for sweep in LLA.sweeps:
        assert sweep.reads() <= known, f"{sweep.name} reads {sorted(sweep.reads() - known)} before it exists"
        known |= set(sweep.writes())
    assert {*LLA.outputs, *LLA.info} <= known
    assert LLA.stages[1].active in STATS.writes()


def test_score_columns_and_accumulator_columns_are_inputs():
    for sweep in LLA.sweeps:
        assert {x.col for x in (*sweep.scores, *sweep.accumulators)} <= set(LLA.col_inputs)


def test_reads():
    assert STATS.reads() == {"q"}
    assert STATS.stream_reads() == {"q"}
    assert OUTPUT.stream_reads() == {"q", "probe", "kbar", "lse"}
    assert {"direction", "direction_mean", "lse", "q"} == CG_STEP.stream_reads()
    assert {"ridge", "cg_tol", "rho", "residual", "probe", "kbar"} <= CG_STEP.reads() - CG_STEP.stream_reads()


def test_state_is_what_crosses_sweeps():
    state = LLA.state()
    assert state["kbar"] is Kind.VECTOR and state["lse"] is Kind.ROW
    assert {"probe", "residual", "direction", "active", "rho"} <= set(state)
    assert not {"key_sum", "image", "curvature", "unit_probe", "out"} & set(state)


def test_row_operands_are_exact_in_a_product():
    for sweep in LLA.sweeps:
        assert {score.row for score in sweep.scores} <= {*LLA.row_inputs, *LLA.rounded()}
    assert LLA.rounded() == {"direction", "unit_probe"}


def test_products_are_those_of_the_design():
    assert [sweep.products for sweep in LLA.sweeps] == [2, 3, 3]
    assert LLA.products(iterations=0) == 5
    assert LLA.products(iterations=10) == 35


def test_unknown_operator():
    with pytest.raises(NotImplementedError, match="no lowering for op 'lla', phase 'backward'"):
        lower("lla", "backward")
