"""Expressions evaluated on tensors: a ROW is (..., rows, 1), so that it broadcasts against VECTOR and TILE."""

from __future__ import annotations

import operator
from typing import Callable, Mapping

import torch
from torch import Tensor

from lla_compile.expr import Expr, fold

Value = Tensor | float


def evaluate(
    expr: Expr, values: Mapping[str, Value], round_operand: Callable[[Tensor], Tensor], wide: bool = False
) -> Value:
    """The value of ``expr`` with its symbols looked up in ``values``.

    ``rounded`` is done by ``round_operand``; a ``wide_dot`` is taken and kept in float64 where ``wide``.

    Raises:
        KeyError: a symbol has no value, or the interpreter lacks an operation.
    """

    def leaf(e: Expr) -> Value:
        return values[e.args[0]] if e.op == "symbol" else e.args[0]

    def node(e: Expr, args: list[Value]) -> Value:
        if e.op == "rounded":
            return round_operand(*args)
        if e.op == "wide_dot":
            return _dot(*(x.double() for x in args)) if wide else _dot(*args)
        return _OPERATIONS[e.op](*args)

    return fold(expr, leaf, node)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)


_OPERATIONS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "gt": operator.gt,
    "lt": operator.lt,
    "and": operator.and_,
    "where": torch.where,
    "dot": _dot,
    "sqrt": torch.sqrt,
    "log2": torch.log2,
}
