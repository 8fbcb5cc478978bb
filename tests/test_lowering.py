"""The operators as sweeps: names flow from sweep to sweep, the work is what the equations need, no more is computed
than what is asked for."""

import itertools
from dataclasses import replace

import pytest

from lla_compile.expr import Kind
from lla_compile.lowering import INFO, SAVED, lower
from lla_compile.sweeps import Loop, sweep_of

FORWARD, BACKWARD = lower("lla", "forward"), lower("lla", "backward")
LISTS = pytest.mark.parametrize("program", [FORWARD, BACKWARD], ids=lambda x: x.name)


def inputs(program) -> set[str]:
    return {*program.row_inputs, *program.col_inputs, *program.scalars, *program.row_scalars, *program.given, "scale"}


def work(program) -> dict[str, int]:
    """Tile products of every sweep that is left; a coarse loop takes turns off the loop before it and adds none."""
    sweeps = [sweep_of(stage) for stage in program.stages if not (isinstance(stage, Loop) and stage.coarse)]
    return {sweep.name: sweep.products for sweep in sweeps}


def assert_names_flow(program):
    known = inputs(program)
    for stage in program.stages:
        missing = stage.reads() - known
        assert not missing, f"{sweep_of(stage).name} reads {sorted(missing)} before it exists"
        if isinstance(stage, Loop):
            assert stage.active in stage.sweep.writes()
        known |= stage.writes().keys()
    assert program.outputs.keys() <= known


def test_lists_are_those_of_the_design():
    assert work(FORWARD) == {"stats": 2, "cg_step": 3, "output": 3}
    assert work(BACKWARD) == {"adjoint_stats": 3, "cg_step": 3, "grad_q": 5, "grad_kv": 8}
    assert FORWARD.products(iterations=10) == 5 + 30 and BACKWARD.products(iterations=10) == 16 + 30
    assert [sweep.name for sweep in FORWARD.sweeps if sweep.softmax == "online"] == ["stats"]
    assert {sweep.softmax for sweep in BACKWARD.sweeps} == {"saved"}
    assert [sweep.name for sweep in BACKWARD.sweeps if sweep.holds == "keys"] == ["grad_kv"]
    assert BACKWARD.key_outputs == {"dk", "dv"}


def test_both_passes_solve_alike():
    """With products in the tier's precision first, then coarse ones, by the same sweep."""
    forward, backward = ([x for x in program.stages if isinstance(x, Loop)] for program in (FORWARD, BACKWARD))
    assert forward == backward
    fine, coarse = forward
    assert (fine.coarse, coarse.coarse) == (False, True)
    assert replace(coarse.sweep, name=fine.sweep.name) == fine.sweep


@LISTS
def test_every_name_that_is_read_was_written_before(program):
    assert_names_flow(program)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@LISTS
def test_names_flow_in_every_reduced_list(program, count):
    for wanted in itertools.combinations(program.outputs, count):
        reduced = program.wanting(wanted)
        assert_names_flow(reduced)
        assert set(reduced.outputs) == set(wanted)
        assert all(reduced.kinds[name] is program.kinds[name] for name in wanted)


@LISTS
def test_columns_are_inputs_and_rows_are_exact_in_a_product(program):
    for sweep in program.sweeps:
        assert {score.col for score in sweep.scores} <= set(program.col_inputs)
        assert {score.row for score in sweep.scores} <= {*program.row_inputs, *program.rounded}
        streamed = program.col_inputs if sweep.holds == "rows" else {*program.row_inputs, *program.rounded}
        assert {a.operand for a in sweep.accumulators} <= set(streamed)


def test_what_the_backward_pass_is_given_is_what_the_forward_pass_saves():
    assert BACKWARD.given == SAVED == {name: FORWARD.kinds[name] for name in SAVED}
    assert SAVED.keys() <= FORWARD.outputs.keys()
    assert FORWARD.rounded == {"direction", "unit_probe"} and FORWARD.wide == {"probe_mean"}
    assert BACKWARD.rounded == {"direction", "unit_probe", "unit_adjoint"}
    assert BACKWARD.wide == {"probe_mean", "adjoint_mean"}


@pytest.mark.parametrize(
    "wanted, expected",
    [
        (("dv",), {"grad_kv": 3}),  # p and c need what the forward pass has saved, and no solve
        (("dk",), {"adjoint_stats": 3, "cg_step": 3, "grad_q": 5, "grad_kv": 7}),
        (("dk", "dv"), {"adjoint_stats": 3, "cg_step": 3, "grad_q": 5, "grad_kv": 8}),
        (("dq",), {"adjoint_stats": 3, "cg_step": 3, "grad_q": 5}),
        (("dq", "dridge", "dscale"), {"adjoint_stats": 3, "cg_step": 3, "grad_q": 5}),
        (("dq", "dv"), {"adjoint_stats": 3, "cg_step": 3, "grad_q": 5, "grad_kv": 3}),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_what_is_not_asked_for_costs_nothing(wanted, expected):
    assert work(BACKWARD.wanting(wanted)) == expected


def test_the_value_gradient_reads_no_more_than_it_needs():
    assert set(BACKWARD.wanting(("dv",)).given) == {"lse", "unit_probe", "probe_norm", "probe_mean"}


def test_the_ridge_gradient_streams_no_keys_after_the_solve():
    grad_q = BACKWARD.wanting(("dridge",)).sweeps[-1]
    assert grad_q.name == "grad_q" and not grad_q.streams and not grad_q.epilogue


@LISTS
def test_the_residual_is_computed_only_when_asked_for(program):
    assert "final_residual" not in program.wanting(program.ordinary).kinds
    assert INFO.keys() <= program.wanting((*program.ordinary, *INFO)).kinds.keys()


def test_saved_names_alone_need_no_output():
    assert list(work(FORWARD.wanting(("lse", "kbar")))) == ["stats"]
    probe = FORWARD.wanting(("unit_probe", "probe_mean"))
    assert list(work(probe)) == ["stats", "cg_step", "output"] and not probe.sweeps[-1].streams


@LISTS
def test_an_ordinary_call_asks_for_outputs(program):
    assert set(program.ordinary) <= program.outputs.keys()


@LISTS
def test_outputs_are_in_the_order_of_the_list(program):
    assert list(program.wanting(tuple(reversed(program.outputs))).outputs) == list(program.outputs)


@pytest.mark.parametrize("program, name", [(FORWARD, "dq"), (BACKWARD, "out"), (BACKWARD, "grad_out")])
def test_unknown_outputs(program, name):
    with pytest.raises(ValueError, match=f"{program.name} has no output {name}; it has .*iterations, final_residual"):
        program.wanting((name,))


def test_what_crosses_launches():
    split = FORWARD.crossing((stage,) for stage in FORWARD.stages)
    assert {"kbar", "lse", "solution", "residual", "direction", "active", "rho"} <= set(split)
    assert not {"key_sum", "image", "curvature", "unit_probe", "out"} & set(split)
    assert split["kbar"] is Kind.VECTOR and split["lse"] is Kind.ROW
    assert FORWARD.crossing([FORWARD.stages]) == {}
    *by_row, by_key = BACKWARD.stages
    fused = BACKWARD.crossing([tuple(by_row), (by_key,)])
    assert set(fused) == {"unit_adjoint", "adjoint_norm", "adjoint_mean", "gbar", "shift"}


def test_sums_of_a_sweep_that_holds_keys_can_be_taken_apart():
    apart = BACKWARD.one_sum_a_sweep()
    assert apart.stages[:-2] == BACKWARD.stages[:-1]
    assert {name: work(apart)[name] for name in ("grad_kv_dv", "grad_kv_dk")} == {"grad_kv_dv": 3, "grad_kv_dk": 7}
    assert_names_flow(apart)
    assert list(work(apart.wanting(("dv",)))) == ["grad_kv_dv"]
    assert FORWARD.one_sum_a_sweep().stages == FORWARD.stages


def test_unknown_operator():
    with pytest.raises(NotImplementedError, match="no lowering for op 'lla', phase 'generate'; known: .*lla decode"):
        lower("lla", "generate")


def test_a_list_is_made_once():
    assert lower("lla", "backward") is BACKWARD
