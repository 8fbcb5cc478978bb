"""What the `gram` kernels of every backend have in common: the heads they can hold, and how keys are cut into parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lla_compile.spec import LLASpec

# Wider heads have covariances that one multiprocessor cannot hold.
MAX_HEAD_DIM = 128
MAX_SPLITS = 64
# A tolerance of 10^-3.5 takes under 20 iterations where keys are many and up to 200 where they are about as many as
# dimensions.
CG_MAX_ITERS = 256
LEAST_KEYS_OF_A_PART = 256
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def unsupported(spec: LLASpec) -> str | None:
    """Why no `gram` kernel can run the spec, or None."""
    if not spec.solves:
        return f"gram solves a system, which op {spec.op} has none of"
    if spec.dtype not in ("float16", "bfloat16"):
        return f"gram has no {spec.dtype} kernel"
    widest = max(spec.head_dim, spec.head_dim_v)
    if widest > MAX_HEAD_DIM:
        return f"gram holds covariances of at most {MAX_HEAD_DIM} dimensions, got {widest}"
    return None


def split_counts(spec: LLASpec) -> tuple[int, ...]:
    """Numbers of parts worth trying."""
    longest = max(spec.visible_seqlen // 64, 1)
    return tuple(splits for splits in _SPLITS if splits <= longest)


def splits_that_fill(spec: LLASpec, blocks: int) -> int:
    """Parts of a query so that there are ``blocks`` in all, but none of a few keys."""
    return max(min(blocks, -(-spec.visible_seqlen // LEAST_KEYS_OF_A_PART), MAX_SPLITS), 1)
