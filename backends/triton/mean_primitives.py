"""Hand-written Triton building blocks of the operators that solve nothing."""

import triton
import triton.language as tl


@triton.jit
def seeded_product(seed, held, streamed, INPUT_PRECISION: tl.constexpr):
    """held . streamed^T - seed in float32; ``seed`` broadcasts to the tile.

    The sum starts at -seed: nothing is left to subtract, and no register holds the seed meanwhile.
    """
    start = tl.broadcast_to(-seed, [held.shape[0], streamed.shape[0]])
    return tl.dot(held, tl.trans(streamed), start, input_precision=INPUT_PRECISION)


@triton.jit
def part_segments(start, full_start, full_stop, stop, split, num_splits, BLOCK_K: tl.constexpr):
    """The bounds of ``key_segments`` cut to one of ``num_splits`` parts of about as many tiles each."""
    tiles = tl.cdiv(stop - start, BLOCK_K)
    span = tl.cdiv(tiles, num_splits) * BLOCK_K
    first = tl.minimum(start + split * span, stop)
    last = tl.minimum(first + span, stop)
    full_start = tl.minimum(tl.maximum(full_start, first), last)
    full_stop = tl.minimum(tl.maximum(full_stop, full_start), last)
    return first, full_start, full_stop, last


@triton.jit
def store_part(base, offsets, value, valid, BLOCK_WIDTH: tl.constexpr):
    """Rows of a tile, each at its own offset."""
    columns = tl.arange(0, BLOCK_WIDTH)
    tl.store(base + offsets[:, None] + columns[None, :], value, mask=valid[:, None])


@triton.jit
def load_parts(base, offsets, exists, other, BLOCK_WIDTH: tl.constexpr):
    """Inverse of :func:`store_part`, (parts, BLOCK_WIDTH)."""
    columns = tl.arange(0, BLOCK_WIDTH)
    return tl.load(base + offsets[:, None] + columns[None, :], mask=exists[:, None], other=other)
