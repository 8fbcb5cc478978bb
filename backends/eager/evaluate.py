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


def _divide(x: Value, y: Value) -> Value:
    """x / y, whose derivative at y = 0 is zero: expressions select such a value away, but 0 * inf would be NaN."""
    if not (isinstance(y, Tensor) and y.requires_grad):
        return x / y
    return torch.where(y == 0, x / y.detach(), x / torch.where(y == 0, 1, y))


def _sqrt(x: Tensor) -> Tensor:
    """The square root, whose derivative at 0 is zero, for the same reason."""
    if not x.requires_grad:
        return x.sqrt()
    return torch.where(x == 0, 0, torch.where(x == 0, 1, x).sqrt())


_OPERATIONS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": _divide,
    "gt": operator.gt,
    "lt": operator.lt,
    "and": operator.and_,
    "where": torch.where,
    "dot": _dot,
    "sqrt": _sqrt,
    "log2": torch.log2,
}
