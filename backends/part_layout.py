"""What a part of a row leaves when an operator of one sweep decodes, in the order that every GPU backend stores it in.

A part is a stretch of the keys. It leaves the accumulators of the sweep over these keys alone, vectors of padded width,
and after them numbers: row maximum, row sum and the means of scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lla_compile.backends.tiles import padded_width

if TYPE_CHECKING:
    from lla_compile.spec import LLASpec
    from lla_compile.sweeps import Sweep, SweepList

_LEAST_NUMBERS = 4  # so that vectors stay aligned


def part_numel(program: SweepList, spec: LLASpec) -> int:
    """float32 numbers that a part of a row leaves."""
    (sweep,) = program.sweeps
    widths = (spec.head_dim_v if a.name in program.value_wide else spec.head_dim for a in sweep.accumulators)
    return sum(map(padded_width, widths)) + max(len(part_numbers(sweep)), _LEAST_NUMBERS)


def part_numbers(sweep: Sweep) -> tuple[str, ...]:
    """The numbers of a part, in order."""
    return ("row_max", "row_sum", *(score.mean for score in sweep.scores if score.mean))
