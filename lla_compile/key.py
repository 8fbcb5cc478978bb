"""The tuning key and the bucketing of sizes: one definition for the tuner and for look-ups at run time."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from lla_compile.spec import PRECISIONS, LLASpec


@dataclass(frozen=True)
class TuningKey:
    """What must be equal for a tuned plan to be meaningful at all; its fields are an entry's ``key`` in the database.

    ``group`` counts the queries that share a key in phase "decode", rounded to a power of two; other phases have none.
    """

    op: str
    phase: str
    dtype: str
    head_dim: int
    head_dim_v: int
    precision: str
    causal: bool
    group: int | None = None

    def as_dict(self) -> dict:
        """The fields that are set, in the order of the database."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def describe(self) -> str:
        mask = "causal" if self.causal else "full"
        group = "" if self.group is None else f" group {self.group}"
        return (
            f"{self.op} {self.phase} {self.dtype} D{self.head_dim} Dv{self.head_dim_v} {self.precision} {mask}{group}"
        )


@dataclass(frozen=True)
class Bucket:
    """Problem sizes rounded to the nearest power of two: what a plan was tuned at."""

    seqlen: int
    batch_heads: int

    def seqlen_range(self) -> tuple[int, int]:
        """Smallest and largest sequence length that falls into this bucket."""
        return _range_of_power(self.seqlen)

    def batch_heads_range(self) -> tuple[int, int]:
        """Smallest and largest number of heads that falls into this bucket."""
        return _range_of_power(self.batch_heads)

    def distance(self, other: Bucket) -> float:
        """Octaves between two buckets, summed over both sizes."""
        return abs(math.log2(self.seqlen / other.seqlen)) + abs(math.log2(self.batch_heads / other.batch_heads))


def bucket_of(seqlen: int, batch_heads: int) -> Bucket:
    """The bucket of a problem with ``seqlen`` visible keys and ``batch_heads`` independent heads."""
    return Bucket(_nearest_power(seqlen), _nearest_power(batch_heads))


def key_of(spec: LLASpec) -> TuningKey:
    """The part of a spec that a tuned plan depends on, sizes apart."""
    return TuningKey(
        op=spec.op,
        phase=spec.phase,
        dtype=spec.dtype,
        head_dim=spec.head_dim,
        head_dim_v=spec.head_dim_v,
        # The tiers of what compiles to the same kernels are one.
        precision=spec.precision if spec.solves or spec.dtype == "float32" else PRECISIONS[-1],
        causal=spec.is_causal,
        group=_nearest_power(spec.group_size * spec.seqlen_q) if spec.phase == "decode" else None,
    )


def sizes_of(spec: LLASpec) -> tuple[int, int]:
    """(seqlen, batch_heads) as plans are tuned for: a window counts as the length, and in phase "decode" several queries
    of one head, each with a system of its own, count as so many heads."""
    return spec.visible_seqlen, spec.batch_heads * (spec.seqlen_q if spec.phase == "decode" else 1)


def bucket_of_spec(spec: LLASpec) -> Bucket:
    """The bucket of a spec."""
    return bucket_of(*sizes_of(spec))


def _nearest_power(size: int) -> int:
    """The power of two nearest to ``size``; at the midpoint, the larger."""
    size = max(size, 1)
    low = 1 << (size.bit_length() - 1)
    return low if size < low + low // 2 + (low == 1) else 2 * low


def _range_of_power(power: int) -> tuple[int, int]:
    low = (3 * power + 3) // 4
    high = (3 * power - 1) // 2
    return low, max(low, high)
