"""Expressions: kinds, symbols, evaluation and printing."""

import math

import pytest

from lla_compile.expr import Kind, dot, fold, log2, row, scalar, sqrt, tile, to_source, vector, where

TEMPLATES = {
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
    "gt": "({0} > {1})",
    "lt": "({0} < {1})",
    "and": "({0} and {1})",
    "where": "({1} if {0} else {2})",
    "sqrt": "math.sqrt({0})",
    "log2": "math.log2({0})",
    "dot": "sum({0} * {1}, 1)",
}


def test_kinds_broadcast_upwards():
    assert (row("r") + 1).kind is Kind.ROW
    assert (row("r") * scalar("c")).kind is Kind.ROW
    assert (vector("x") * row("r")).kind is Kind.VECTOR
    assert (1 - tile("t") * row("r")).kind is Kind.TILE
    assert dot(vector("x"), vector("y")).kind is Kind.ROW
    assert where(row("r") > 0, vector("x"), 0).kind is Kind.VECTOR


def test_vectors_and_tiles_do_not_mix():
    with pytest.raises(TypeError, match="mixes a vector .* with a tile"):
        vector("x") + tile("t")
    with pytest.raises(TypeError, match="dot takes two vectors, got a vector and a row"):
        dot(vector("x"), row("r"))


def test_symbols():
    assert where(row("a") > 0, dot(vector("x"), vector("y")), scalar("c") + 2).symbols() == {"a", "x", "y", "c"}


def test_printed_source_computes_the_value():
    a, b = row("a"), row("b")
    expression = where((a > 1) & (b < 3), sqrt(a) / (2 - b) + log2(b), 7 - (3 / a) * b)
    source = to_source(expression, TEMPLATES)
    for a_value, b_value in ((4.0, 0.5), (0.5, 0.5), (4.0, 5.0)):
        taken = a_value > 1 and b_value < 3
        first = math.sqrt(a_value) / (2 - b_value) + math.log2(b_value)
        expected = first if taken else 7 - (3 / a_value) * b_value
        assert eval(source, {"math": math, "a": a_value, "b": b_value}) == pytest.approx(expected)


def test_rows_get_an_axis_only_against_wider_kinds():
    assert to_source(vector("x") * row("r"), TEMPLATES) == "(x * r[:, None])"
    assert to_source(row("r") * row("s"), TEMPLATES) == "(r * s)"
    assert to_source(dot(vector("x"), vector("y")) * vector("x"), TEMPLATES) == "(sum(x * y, 1)[:, None] * x)"
    assert to_source(row("r") * tile("t"), TEMPLATES, broadcast="col({})") == "(col(r) * t)"


def test_names_and_infinities_are_printed_as_asked():
    assert to_source(row("r") < float("inf"), TEMPLATES, names={"r": "r_ptr"}) == '(r_ptr < float("inf"))'


def test_fold_visits_leaves_before_nodes():
    order = []
    total = fold(
        (row("a") + 2) * row("b"),
        leaf=lambda e: order.append(e.args[0]) or {"a": 3.0, "b": 5.0}.get(e.args[0], e.args[0]),
        node=lambda e, args: order.append(e.op) or (args[0] + args[1] if e.op == "add" else args[0] * args[1]),
    )
    assert total == 25.0
    assert order == ["a", 2.0, "add", "b", "mul"]
