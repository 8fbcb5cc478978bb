"""Printing what decoding in parts takes from the sweep of an operator: which sums there are, and what comes of them.

How keys are streamed and parts are merged is written by hand in ``part_pass.cu``, ``part_merge.cu`` and ``include/``;
printed are the operators' own expressions, for one column of one row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from lla_compile.backends.cuda.sweep_source import TEMPLATES
from lla_compile.backends.part_layout import part_numbers
from lla_compile.expr import Expr, fold
from lla_compile.lowering import lower
from lla_compile.sweeps import P, Sweep, SweepList

HEADER = "part_sums.cuh"
_PROBE_SCORE = "a"  # by what name the weight of the second sum knows its score


@dataclass(frozen=True)
class PartSource:
    """The printed header of an operator, by name, and the sweeps that it is of."""

    program: SweepList
    headers: dict[str, str]


@lru_cache(maxsize=None)
def print_parts(op: str) -> PartSource:
    """What the kernels include beside their own headers when they decode an operator of one sweep."""
    program = lower(op, "decode")
    return PartSource(program, {HEADER: _text(program)})


def _text(program: SweepList) -> str:
    (sweep,) = program.sweeps
    _check(program, sweep)
    sums = [accumulator.name for accumulator in sweep.accumulators]
    numbers = part_numbers(sweep)
    lines = [
        f"// Printed: the sums of {program.name}, and what comes of them.",
        "#pragma once",
        "#include <ptx.cuh>",
        "",
        f"constexpr int ROW_INPUTS = {len(program.row_inputs)}, SUMS = {len(sums)}, NUMBERS = {len(numbers)};",
        "",
        "// Of a column of a row; the mean is that of the second score.",
        "struct Sums {",
        "    float maximum, row_sum, mean, of[SUMS];",
        "};",
        "",
        "// The weight of the second sum, by the softmax weight and by the second score less its mean.",
        f"DEVICE float second_weight(float p, float {_PROBE_SCORE}) {{ return {_second_weight(sweep)}; }}",
        "",
        "// The output of a column.",
        "DEVICE float output_of(const Sums& sums) {",
    ]
    for name, member in zip(numbers, ("maximum", "row_sum", "mean")):
        lines.append(f"    const float {name} = sums.{member};")
    lines += [f"    const float {name} = sums.of[{place}];" for place, name in enumerate(sums)]
    lines += [f"    const float {assign.name} = {_expression(assign.value)};" for assign in sweep.epilogue]
    return "\n".join([*lines, "    return out;", "}", ""])


def _check(program: SweepList, sweep: Sweep) -> None:
    """That the sweep is one that the written kernels carry out."""
    weights, *abouts = sweep.accumulators
    _, *others = sweep.scores
    assert sweep.softmax == "online" and not sweep.prologue and not sweep.weights
    assert weights.weight == P and all(x.operand == "v" for x in sweep.accumulators)
    assert tuple(score.row for score in sweep.scores) == program.row_inputs and len(others) == len(abouts) <= 1
    assert all(x.about == weights.name for x in abouts) and all(x.mean and x.name == _PROBE_SCORE for x in others)
    assert tuple(program.outputs) == ("out",)


def _second_weight(sweep: Sweep) -> str:
    return _expression(sweep.accumulators[1].weight) if len(sweep.accumulators) > 1 else "p"


def _expression(value: Expr) -> str:
    def leaf(x: Expr) -> str:
        if x.op == "symbol":
            return x.args[0]
        (number,) = x.args
        return f"{'-' if number < 0 else ''}INFINITE" if math.isinf(number) else f"{number!r}f"

    return fold(value, leaf, lambda x, args: TEMPLATES[x.op].format(*args))
