"""A tiny expression type: what a sweep computes per tile element or per row, printable by any backend.

An expression is a tree of operations on symbols. Its *kind* says over what it ranges, and smaller kinds broadcast
to larger ones, so that a backend knows where to add an axis:

    SCALAR (1)   ROW (rows,)   VECTOR (rows, head_dim)   TILE (rows, keys)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Callable, Mapping


class Kind(Enum):
    SCALAR = "scalar"
    ROW = "row"
    VECTOR = "vector"
    TILE = "tile"


@dataclass(frozen=True)
class Expr:
    """``op`` applied to ``args``; a leaf has op "symbol" (args: its name) or "const" (args: a float)."""

    op: str
    args: tuple
    kind: Kind

    def __add__(self, other):
        return _apply("add", self, other)

    def __radd__(self, other):
        return _apply("add", other, self)

    def __sub__(self, other):
        return _apply("sub", self, other)

    def __rsub__(self, other):
        return _apply("sub", other, self)

    def __mul__(self, other):
        return _apply("mul", self, other)

    def __rmul__(self, other):
        return _apply("mul", other, self)

    def __truediv__(self, other):
        return _apply("div", self, other)

    def __rtruediv__(self, other):
        return _apply("div", other, self)

    def __gt__(self, other):
        return _apply("gt", self, other)

    def __lt__(self, other):
        return _apply("lt", self, other)

    def __and__(self, other):
        return _apply("and", self, other)

    def symbols(self) -> frozenset[str]:
        """Names of the symbols in the tree."""
        if self.op == "symbol":
            return frozenset(self.args)
        if self.op == "const":
            return frozenset()
        return frozenset().union(*(a.symbols() for a in self.args))


def symbol(name: str, kind: Kind) -> Expr:
    return Expr("symbol", (name,), kind)


def scalar(name: str) -> Expr:
    return symbol(name, Kind.SCALAR)


def row(name: str) -> Expr:
    return symbol(name, Kind.ROW)


def vector(name: str) -> Expr:
    return symbol(name, Kind.VECTOR)


def tile(name: str) -> Expr:
    return symbol(name, Kind.TILE)


def log2(x: Expr) -> Expr:
    return _apply("log2", x)


def sqrt(x: Expr) -> Expr:
    return _apply("sqrt", x)


def rounded(x: Expr) -> Expr:
    """``x`` as a tile product can take it: the nearest value that the spec's precision tier represents."""
    return _apply("rounded", x)


def where(condition: Expr, x, y) -> Expr:
    return _apply("where", condition, x, y)


def dot(x: Expr, y: Expr) -> Expr:
    """Row-wise inner product of two VECTORs: a ROW."""
    if x.kind is not Kind.VECTOR or y.kind is not Kind.VECTOR:
        raise TypeError(f"dot takes two vectors, got a {x.kind.value} and a {y.kind.value}")
    return Expr("dot", (x, y), Kind.ROW)


def wide_dot(x: Expr, y: Expr) -> Expr:
    """:func:`dot` in the widest type that the spec's precision tier asks for: where large terms cancel."""
    return Expr("wide_dot", dot(x, y).args, Kind.ROW)


_RANK = {Kind.SCALAR: 0, Kind.ROW: 1, Kind.VECTOR: 2, Kind.TILE: 2}


def _apply(op: str, *args) -> Expr:
    args = tuple(a if isinstance(a, Expr) else Expr("const", (float(a),), Kind.SCALAR) for a in args)
    kinds = {a.kind for a in args}
    if {Kind.VECTOR, Kind.TILE} <= kinds:
        raise TypeError(f"{op} mixes a vector (rows, head_dim) with a tile (rows, keys)")
    return Expr(op, args, max(kinds, key=_RANK.__getitem__))


def fold(expr: Expr, leaf: Callable[[Expr], object], node: Callable[[Expr, list], object]):
    """Evaluate bottom-up: ``leaf`` turns symbols and constants into values, ``node`` combines the arguments' values."""
    if expr.op in ("symbol", "const"):
        return leaf(expr)
    return node(expr, [fold(a, leaf, node) for a in expr.args])


def to_source(
    expr: Expr, templates: Mapping[str, str], broadcast: str = "{}[:, None]", names: Mapping[str, str] | None = None
) -> str:
    """Print an expression as source text.

    Args:
        expr: what to print.
        templates: for each operation a format string of its arguments, e.g. ``{"log2": "tl.log2({0})"}``.
        broadcast: how a ROW is made to broadcast against a VECTOR or TILE.
        names: source text of symbols that are not printed as their own name.
    """
    names = names or {}

    def leaf(e: Expr) -> str:
        if e.op == "symbol":
            return names.get(e.args[0], e.args[0])
        value = e.args[0]
        return f'float("{value}")' if value in (float("inf"), float("-inf")) else repr(value)

    def node(e: Expr, args: list[str]) -> str:
        if e.op not in ("dot", "wide_dot") and _RANK[e.kind] == 2:
            args = [broadcast.format(s) if a.kind is Kind.ROW else s for s, a in zip(args, e.args)]
        return templates[e.op].format(*args)

    return fold(expr, leaf, node)
