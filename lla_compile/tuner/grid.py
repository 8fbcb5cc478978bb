"""The keys and sizes that one command tunes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from lla_compile.spec import LLASpec


@dataclass(frozen=True)
class Grid:
    """Every combination of these values is one search.

    Attributes:
        head_dims_v: widths of the value; empty makes it follow the query's width.
    """

    phases: tuple[str, ...]
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    head_dims_v: tuple[int, ...]
    seqlens: tuple[int, ...]
    batch_heads: tuple[int, ...]
    precisions: tuple[str, ...]
    causal: tuple[bool, ...]

    def specs(self) -> list[LLASpec]:
        """One spec for each combination.

        Raises:
            ValueError: a value is not allowed; the message names it.
        """
        combinations = itertools.product(
            self.phases, self.dtypes, self.causal, self.head_dims, self.head_dims_v or (None,), self.precisions,
            self.seqlens, self.batch_heads,
        )  # fmt: skip
        return [
            LLASpec.self_attention(
                dtype, head_dim, seqlen, heads, head_dim_v, phase=phase, is_causal=causal, precision=precision
            )
            for phase, dtype, causal, head_dim, head_dim_v, precision, seqlen, heads in combinations
        ]
