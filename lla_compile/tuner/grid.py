"""The keys and sizes that one command tunes for a phase."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from lla_compile.spec import LLASpec


@dataclass(frozen=True)
class Grid:
    """Every combination of these values is one search.

    Attributes:
        head_dims_v: widths of the value; empty makes it follow the query's width.
        groups: query heads that share a key head, for phase "decode" alone; they must divide ``batch_heads``.
    """

    phase: str
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    head_dims_v: tuple[int, ...]
    seqlens: tuple[int, ...]
    batch_heads: tuple[int, ...]
    precisions: tuple[str, ...]
    causal: tuple[bool, ...]
    groups: tuple[int, ...]
    op: str = "lla"

    @property
    def indivisible(self) -> list[tuple[int, int]]:
        """The pairs of heads and group that :meth:`specs` leaves out, since the one is no multiple of the other."""
        if self.phase != "decode":
            return []
        return [(heads, group) for heads in self.batch_heads for group in self.groups if heads % group]

    def specs(self) -> list[LLASpec]:
        """One spec for each combination.

        Raises:
            ValueError: a value is not allowed; the message names it.
        """
        combinations = itertools.product(
            self.dtypes, self.causal, self.head_dims, self.head_dims_v or (None,), self.precisions,
            self.groups if self.phase == "decode" else (1,), self.seqlens, self.batch_heads,
        )  # fmt: skip
        specs = []
        for dtype, causal, head_dim, head_dim_v, precision, group, seqlen, heads in combinations:
            sizes = dtype, head_dim, seqlen, heads, head_dim_v
            fields = {"op": self.op, "is_causal": causal, "precision": precision}
            if self.phase != "decode":
                specs.append(LLASpec.self_attention(*sizes, phase=self.phase, **fields))
            elif heads % group == 0:
                specs.append(LLASpec.decoding(*sizes, group_size=group, **fields))
        return specs
