"""What is computed: the frozen, validated description of one attention problem."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lla_compile.precision import split_terms

MAX_HEAD_DIM = 256
MAX_DECODE_QUERIES = 16
DTYPES = ("float16", "bfloat16", "float32", "float64")
PRECISIONS = ("fast", "accurate")
OPS = ("lla", "parallax", "softmax")
SOLVING_OPS = ("lla",)  # the probe is the solution of a system; Parallax is given one, softmax attention has none
PHASES = ("forward", "backward", "decode")

# Relative residual at which CG stops when the caller does not say. In a 16-bit type the output's own rounding is 2e-3,
# so a smaller residual cannot be seen; `fast` carries more error than its tolerance adds. Gradients see more of it:
# at ridge 0.1 an adjoint solve to 1e-3 leaves 5e-3 in dk and 8e-3 in dridge, one to 10^-3.5 leaves 2e-3 in both.
_DEFAULT_CG_TOL = {
    ("float16", "fast"): 10**-2.5,
    ("bfloat16", "fast"): 10**-2.5,
    ("float32", "fast"): 1e-3,
    ("float16", "accurate"): 1e-3,
    ("bfloat16", "accurate"): 1e-3,
    ("float32", "accurate"): 1e-6,
    ("float64", "fast"): 1e-6,
    ("float64", "accurate"): 1e-12,
}
# A D x D system that is at hand costs little to solve further.
_TIGHT_CG_TOL = {("float16", "accurate"): 10**-3.5, ("bfloat16", "accurate"): 10**-3.5}
_PHASE_CG_TOL = {"backward": _TIGHT_CG_TOL, "decode": _TIGHT_CG_TOL}


@dataclass(frozen=True)
class LLASpec:
    """One attention problem of the family: shapes, types, mask and solver settings, but no tensors.

    Args:
        dtype: type of query, key, value and output: "float16", "bfloat16", "float32" or "float64".
        head_dim: width D of query and key, 1 to 256.
        head_dim_v: width Dv of value and output, 1 to 256.
        batch: batch size B, may be 0.
        num_heads: query heads Hq, a multiple of ``num_kv_heads``.
        num_kv_heads: key and value heads Hkv.
        seqlen_q: queries N per head.
        seqlen_k: keys M per head.
        is_causal: query i sees keys j <= i + M - N (aligned at the bottom right).
        window_size: number of keys that a query sees, its own included; needs ``is_causal``.
        precision: "fast" rounds the operands of every tile product once; "accurate" splits them in two terms where a
            solve would amplify their rounding.
        cg_tol: CG stops when ||r|| <= cg_tol * ||r_0||; None takes the default of (phase, dtype, precision). Op "lla"
            only: stays None for the others.
        cg_max_iters: cap on the CG iterations; None leaves it to the plan. Op "lla" only.
        num_sequences: None, or how many sequences are packed one after another into ``seqlen_q`` queries and
            ``seqlen_k`` keys; ``batch`` is then 1, and where they end is known only at run time.
        page_size: keys of a page where the cache of phase "decode" is paged, ``seqlen_k`` being as many pages as a
            sequence can have; None for any other tensor.
        op: the operator: "lla", "parallax" (whose probe is an input) or "softmax" (which has none).
        phase: "forward", "backward" or "decode": the last ``seqlen_q`` (1 to 16) positions of sequences whose keys lie
            in a cache of ``seqlen_k`` slots, with lengths that are known only at run time.

    Raises:
        ValueError: a field is outside what is listed above; the message names it.
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_k: int
    is_causal: bool = True
    window_size: int | None = None
    precision: str = "accurate"
    cg_tol: float | None = None
    cg_max_iters: int | None = None
    num_sequences: int | None = None
    page_size: int | None = None
    op: str = "lla"
    phase: str = "forward"

    def __post_init__(self):
        _one_of("op", self.op, OPS)
        _one_of("phase", self.phase, PHASES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("precision", self.precision, PRECISIONS)
        _integer("head_dim", self.head_dim, 1, MAX_HEAD_DIM)
        _integer("head_dim_v", self.head_dim_v, 1, MAX_HEAD_DIM)
        for name in ("batch", "seqlen_q", "seqlen_k"):
            _integer(name, getattr(self, name), 0)
        _integer("num_heads", self.num_heads, 1)
        _integer("num_kv_heads", self.num_kv_heads, 1)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads (grouped-query attention), "
                f"got {self.num_heads} query heads and {self.num_kv_heads} key heads"
            )
        if self.window_size is not None:
            _integer("window_size", self.window_size, 1)
            if not self.is_causal:
                raise ValueError("window_size needs is_causal=True: a window ends at the query's own position")
        if self.num_sequences is not None:
            _integer("num_sequences", self.num_sequences, 0)
            if self.batch != 1:
                raise ValueError(f"packed sequences have batch 1, got {self.batch}")
        if self.phase == "decode":
            _integer("seqlen_q", self.seqlen_q, 1, MAX_DECODE_QUERIES)
            if not self.is_causal or self.num_sequences is not None:
                raise ValueError("decoding is causal and its sequences are not packed")
        if self.page_size is not None:
            _integer("page_size", self.page_size, 1)
            if self.phase != "decode":
                raise ValueError(f"page_size is for phase decode, got phase {self.phase}")
        if not self.solves:
            for name in ("cg_tol", "cg_max_iters"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is for op lla, which solves for its probe, got {getattr(self, name)!r}")
            return
        if self.cg_max_iters is not None:
            _integer("cg_max_iters", self.cg_max_iters, 1)
        if self.cg_tol is None:
            tier = self.dtype, self.precision
            own = _PHASE_CG_TOL.get(self.phase, {})
            object.__setattr__(self, "cg_tol", own.get(tier, _DEFAULT_CG_TOL[tier]))
        elif not (isinstance(self.cg_tol, (int, float)) and 0 <= self.cg_tol < 1):
            raise ValueError(f"cg_tol must be a number with 0 <= cg_tol < 1, got {self.cg_tol!r}")

    @classmethod
    def self_attention(
        cls, dtype: str, head_dim: int, seqlen: int, batch_heads: int, head_dim_v: int | None = None, **fields
    ) -> LLASpec:
        """``batch_heads`` independent heads whose queries and keys are one sequence: what is tuned and measured.

        ``head_dim_v`` follows ``head_dim`` unless given; ``fields`` are any others of the class.
        """
        return cls(
            dtype=dtype,
            head_dim=head_dim,
            head_dim_v=head_dim if head_dim_v is None else head_dim_v,
            batch=1,
            num_heads=batch_heads,
            num_kv_heads=batch_heads,
            seqlen_q=seqlen,
            seqlen_k=seqlen,
            **fields,
        )

    @classmethod
    def decoding(
        cls, dtype: str, head_dim: int, seqlen: int, batch_heads: int, head_dim_v: int | None = None, group_size: int = 1,
        **fields,
    ) -> LLASpec:  # fmt: skip
        """One new token for each of ``batch_heads`` query heads over a full cache of ``seqlen`` keys.

        ``group_size`` query heads share a key head; other arguments as in :meth:`self_attention`.

        Raises:
            ValueError: ``batch_heads`` is no multiple of ``group_size``.
        """
        if batch_heads % group_size:
            raise ValueError(f"batch_heads must be a multiple of group_size {group_size}, got {batch_heads}")
        return cls(
            dtype=dtype,
            head_dim=head_dim,
            head_dim_v=head_dim if head_dim_v is None else head_dim_v,
            batch=batch_heads // group_size,
            num_heads=group_size,
            num_kv_heads=1,
            seqlen_q=1,
            seqlen_k=seqlen,
            phase="decode",
            **fields,
        )

    @property
    def solves(self) -> bool:
        """Whether the operator solves a system for its probe, so that CG settings mean something."""
        return self.op in SOLVING_OPS

    @property
    def terms(self) -> int:
        """Values of the input type whose sum stands for one computed operand of a tile product.

        Where nothing is solved nothing amplifies the rounding of a weight: one term is as accurate as softmax
        attention, an error of 1.1e-3 in bfloat16 under the 1.7e-3 of rounding the output.
        """
        return split_terms(self.dtype, self.precision) if self.solves else 1

    @property
    def group_size(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def batch_heads(self) -> int:
        """Independent attention problems: batch, or packed sequences, times query heads."""
        return self.batch * self.num_heads * (1 if self.num_sequences is None else self.num_sequences)

    @property
    def is_empty(self) -> bool:
        """Whether there is no query or no key at all; else some query sees a key."""
        return not (self.batch and self.seqlen_q and self.seqlen_k and self.num_sequences != 0)

    @property
    def mean_seqlens(self) -> tuple[int, int]:
        """Queries and keys of one head: the mean of packed sequences, rounded up."""
        sequences = self.num_sequences or 1
        return -(-self.seqlen_q // sequences), -(-self.seqlen_k // sequences)

    @property
    def visible_seqlen(self) -> int:
        """Most keys that one query sees: what decides the cost, and so the tuning bucket."""
        keys = self.mean_seqlens[1]
        return keys if self.window_size is None else min(keys, self.window_size)

    @property
    def visible_pairs(self) -> int:
        """Query-key pairs under the mask, summed over batch and query heads; packed sequences count as equally long."""
        n, m = self.mean_seqlens
        if not self.is_causal:
            return self.batch_heads * n * m
        last, first = m, m - n + 1  # keys that the last and the first query see, before clipping
        window = self.visible_seqlen

        def keys_up_to(count: int) -> int:
            """Sum of min(c, window) for c = 1 .. count."""
            count = max(count, 0)
            ramp = min(count, window)
            return ramp * (ramp + 1) // 2 + (count - ramp) * window

        return self.batch_heads * (keys_up_to(last) - keys_up_to(first - 1))

    def describe(self) -> str:
        """The spec in one line."""
        heads = f"{self.num_heads}" if self.group_size == 1 else f"{self.num_heads}/{self.num_kv_heads}"
        mask = "causal" if self.is_causal else "full"
        if self.window_size is not None:
            mask += f", window {self.window_size}"
        batch = f"B {self.batch}" if self.num_sequences is None else f"{self.num_sequences} packed"
        paged = "" if self.page_size is None else f" in pages of {self.page_size}"
        return (
            f"{self.op} {self.phase}, {self.dtype}, {batch}, H {heads}, N {self.seqlen_q}, M {self.seqlen_k}{paged}, "
            f"D {self.head_dim}, Dv {self.head_dim_v}, {mask}, {self.precision}"
        )


def check_ridge(ridge: float) -> None:
    """Raise ValueError unless the number ``ridge`` is positive and finite."""
    if not (ridge > 0 and math.isfinite(ridge)):
        raise ValueError(f"ridge must be positive and finite, got {ridge!r}")


def _one_of(name: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _integer(name: str, value, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        allowed = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
