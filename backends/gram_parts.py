"""A part of a query as the `gram` kernels of every GPU backend leave it: its size, and how it is summed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lla_compile.backends.tiles import padded_width

if TYPE_CHECKING:
    from lla_compile.spec import LLASpec

# `accurate` weighs the keys of a query that sees at most so many in two terms. Where few keys share the weight, their
# rounding does not average out: in one term the error at ridge 0.01 is 2.5e-3 at 2000 keys, 2.3e-3 at 4000.
TWO_TERMS_UP_TO = 3072
# By how much, in powers of two, a part's scores may pass those of its first tile; else its keys are read twice.
HEADROOM = {"bfloat16": 64.0, "float16": 8.0}
VECTORS_AT = 16  # the kernels' constant of the same name


def part_numel(spec: LLASpec) -> int:
    """float32 numbers of a part, which the kernels describe."""
    width, width_v = padded_width(spec.head_dim), padded_width(spec.head_dim_v)
    return VECTORS_AT + 2 * width + width_v + width * (width + width_v)
