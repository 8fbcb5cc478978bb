"""The intermediate representation, on small lists of sweeps: what is read and written, what crosses, what is pruned."""

import pytest

from lla_compile.expr import Kind, dot, log2, rounded, row, scalar, tile, vector, wide_dot
from lla_compile.sweeps import Accumulator, Assign, Loop, P, Score, Sweep, SweepList, sweep_of

START = Sweep(
    name="start",
    softmax="online",
    scores=(Score("s", "q", "k"),),
    accumulators=(Accumulator("key_sum", P, "k"), Accumulator("value_sum", P, "v")),
    epilogue=(
        Assign("mean", vector("key_sum") / row("row_sum")),
        Assign("value", vector("value_sum") / row("row_sum")),
        Assign("lse", row("row_max") + log2(row("row_sum"))),
        Assign("state", row("row_sum") * 0),
        Assign("anchor", row("row_max")),
        Assign("turns", row("row_sum") * 0),
        Assign("active", row("row_sum") * 0 + 1),
    ),
)
TURN = Sweep(
    name="turn",
    softmax="saved",
    prologue=(Assign("unit", rounded(vector("mean") * row("state"))),),
    scores=(Score("s", "q", "k"), Score("a", "unit", "k", center="state"), Score("unused", "q", "v")),
    weights=(Assign("pa", P * tile("a")), Assign("other", P * tile("unused"))),
    accumulators=(
        Accumulator("moved", tile("pa") * scalar("factor"), "k", row_sum="total"),
        Accumulator("ignored", tile("other"), "v"),
    ),
    epilogue=(
        Assign("state", row("total") + dot(vector("moved"), vector("mean")) + row("ridge")),
        Assign("turns", row("turns") + 1),
        Assign("active", row("state") > 0),
        Assign("spread", wide_dot(vector("moved"), vector("moved"))),
    ),
)
BY_KEY = Sweep(
    name="by_key",
    softmax="saved",
    holds="keys",
    scores=(Score("s", "q", "k"),),
    accumulators=(Accumulator("received", P * row("state"), "q"), Accumulator("received", P, "unit")),
)
LOOP = Loop(TURN, active="active", entry=(Assign("mean", vector("mean") * row("anchor")),))
LIST = SweepList(
    name="example",
    stages=(START, LOOP, BY_KEY),
    row_inputs=("q",),
    col_inputs=("k", "v"),
    scalars=("factor",),
    row_scalars=("ridge",),
    outputs={"value": "input", "state": "float32", "turns": "int32", "received": "input", "spread": "float32"},
    ordinary=("value",),
)


def names(assigns) -> list[str]:
    return [x.name for x in assigns]


def test_products_are_counted_with_their_operands():
    assert [sweep.products for sweep in LIST.sweeps] == [3, 5, 3]
    assert LIST.products(iterations=4) == 3 + 4 * 5 + 3
    assert TURN.products_operands == ("k", "k", "v", "k", "v")
    assert BY_KEY.products_operands == ("k", "q", "unit")
    assert [sweep_of(stage) for stage in LIST.stages] == [START, TURN, BY_KEY]


def test_reads_are_what_has_to_exist_before():
    assert START.stream_reads() == START.reads() == {"q"}
    assert TURN.stream_reads() == {"q", "lse", "mean", "state", "factor"}
    assert TURN.reads() == TURN.stream_reads() | {"ridge", "turns"}
    # The operands of a sweep that holds keys are state of the rows that it streams.
    assert BY_KEY.reads() == {"q", "lse", "state", "unit"}


def test_a_loop_also_reads_its_flag_and_what_its_entry_does():
    assert LOOP.reads() == TURN.reads() | {"active", "anchor"}
    entry = (Assign("ridge", row("anchor")), Assign("turns", row("ridge")))
    assert Loop(TURN, active="active", entry=entry).reads() == TURN.reads() - {"ridge", "turns"} | {"active", "anchor"}
    assert LOOP.writes() == TURN.writes() | {"mean": Kind.VECTOR}


def test_writes_have_kinds():
    assert TURN.writes() == {
        "unit": Kind.VECTOR,
        "moved": Kind.VECTOR,
        "total": Kind.ROW,
        "ignored": Kind.VECTOR,
        "state": Kind.ROW,
        "turns": Kind.ROW,
        "active": Kind.ROW,
        "spread": Kind.ROW,
    }
    assert TURN.sums() == {"moved", "total", "ignored"}
    assert LIST.kinds["mean"] is Kind.VECTOR and LIST.kinds["received"] is Kind.VECTOR


def test_what_is_known_of_names():
    assert LIST.rounded == {"unit"}
    assert LIST.wide == {"spread"}
    assert LIST.key_outputs == {"received"}


def test_only_keeps_what_the_live_names_depend_on():
    reduced, before = TURN.only(frozenset({"state", "elsewhere"}))
    assert names(reduced.prologue) == ["unit"]
    assert names(reduced.scores) == ["s", "a"]
    assert names(reduced.weights) == ["pa"]
    assert names(reduced.accumulators) == ["moved"]
    assert names(reduced.epilogue) == ["state"]
    assert before == {"q", "lse", "mean", "state", "factor", "ridge", "elsewhere"}


def test_only_keeps_the_attention_score_and_drops_the_rest_of_the_stream():
    reduced, before = TURN.only(frozenset({"turns"}))
    assert names(reduced.scores) == ["s"] and not (reduced.accumulators or reduced.weights or reduced.prologue)
    assert names(reduced.epilogue) == ["turns"] and "turns" in before


def test_a_running_maximum_needs_the_stream_even_without_accumulators():
    reduced, _ = START.only(frozenset({"lse"}))
    assert not reduced.accumulators and reduced.streams
    assert not TURN.only(frozenset({"turns"}))[0].streams and TURN.streams and BY_KEY.streams


def test_only_of_a_sweep_that_writes_nothing_live():
    assert TURN.only(frozenset({"value"})) == (None, {"value"})


def test_wanting_drops_stages():
    value = LIST.wanting(("value",))
    assert [sweep.name for sweep in value.sweeps] == ["start"]
    assert names(value.sweeps[0].accumulators) == ["value_sum"]
    assert names(value.sweeps[0].epilogue) == ["value"]
    assert value.outputs == {"value": "input"} and value.key_outputs == set()


def test_wanting_keeps_what_a_loop_hands_to_its_next_turn():
    state = LIST.wanting(("state",))
    start, turn = state.sweeps
    # The turns are counted for nobody.
    assert names(start.epilogue) == ["mean", "lse", "state", "anchor", "active"]
    assert names(turn.epilogue) == ["state", "active"] and names(turn.scores) == ["s", "a"]
    assert state.stages[1].active == "active" and names(state.stages[1].entry) == ["mean"]
    assert names(LIST.wanting(("turns",)).sweeps[1].epilogue) == ["state", "turns", "active"]


def test_wanting_keeps_the_order_of_the_list_and_takes_names_in_any():
    both = LIST.wanting(("received", "value"))
    assert list(both.outputs) == ["value", "received"]
    assert [sweep.name for sweep in both.sweeps] == ["start", "turn", "by_key"]
    assert LIST.wanting(("received", "value")) is both


def test_an_unknown_output_is_named():
    with pytest.raises(ValueError, match="example has no output dq, mean; it has value, state, turns, received"):
        LIST.wanting(("value", "mean", "dq"))


def test_what_crosses_launches():
    start, turn, by_key = LIST.stages
    assert LIST.crossing([(start, turn, by_key)]) == {}
    apart = LIST.crossing([(start,), (turn,), (by_key,)])
    assert set(apart) == {"mean", "lse", "state", "anchor", "turns", "active", "unit"}
    assert apart["mean"] is apart["unit"] is Kind.VECTOR and apart["lse"] is Kind.ROW
    # A loop that shares its launch hands its turns on there; alone it is launched once a turn.
    assert set(LIST.crossing([(start, turn), (by_key,)])) == {"lse", "state", "unit"}
    assert set(LIST.crossing([(turn,)])) == {"mean", "state", "turns", "active"}


def test_given_state_is_reduced_to_what_is_read():
    given = SweepList(
        name="second",
        stages=(BY_KEY,),
        row_inputs=("q",),
        col_inputs=("k",),
        scalars=(),
        row_scalars=(),
        outputs={"received": "input"},
        ordinary=("received",),
        given={"lse": Kind.ROW, "state": Kind.ROW, "unit": Kind.VECTOR, "more": Kind.ROW},
        given_rounded=frozenset({"unit"}),
        given_wide=frozenset({"more"}),
    )
    assert given.rounded == {"unit"} and given.wide == {"more"}
    reduced = given.wanting(("received",))
    assert set(reduced.given) == {"lse", "state", "unit"}
    assert reduced.rounded == {"unit"} and reduced.wide == set()
