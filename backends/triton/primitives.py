"""Hand-written Triton building blocks that the generated kernels compose."""

import triton
import triton.language as tl


@triton.jit
def program_tile(pid, num_tiles, batch_heads, heads_per_group, CAUSAL: tl.constexpr):
    """Map a program to (head, query tile).

    Heads run in groups whose keys and values fit in the L2 cache together. Within a group the longest causal rows go
    first, so that short ones fill the tail; the first tile goes before all: its rows see fewer keys than head_dim,
    their covariance is singular and they take the most CG iterations.
    """
    group = pid // (num_tiles * heads_per_group)
    first_head = group * heads_per_group
    size = tl.minimum(batch_heads - first_head, heads_per_group)
    local = pid - group * (num_tiles * heads_per_group)
    rank = local // size
    tile = rank
    if CAUSAL:
        tile = tl.where(rank == 0, 0, num_tiles - rank)
    return first_head + local % size, tile


@triton.jit
def key_segments(
    start_m,
    seqlen_q,
    seqlen_k,
    window,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Bounds of the keys that a query tile sees: (start, full_start, full_stop, stop), see ``lla_compile.masks``.

    Tiles in [full_start, full_stop) are visible to every row, those before and after need the mask.
    """
    start = 0
    full_start = 0
    stop = seqlen_k
    full_stop = seqlen_k
    if CAUSAL:
        shift = seqlen_k - seqlen_q
        last_m = tl.minimum(start_m + BLOCK_Q, seqlen_q) - 1
        stop = tl.maximum(last_m + shift + 1, 0)
        full_stop = tl.maximum(start_m + shift + 1, 0)
        if WINDOWED:
            start = tl.maximum(start_m + shift + 1 - window, 0) // BLOCK_K * BLOCK_K
            full_start = tl.cdiv(tl.maximum(last_m + shift + 1 - window, 0), BLOCK_K) * BLOCK_K
    full_start = tl.minimum(full_start, tl.cdiv(stop, BLOCK_K) * BLOCK_K)
    full_stop = tl.maximum(full_stop // BLOCK_K * BLOCK_K, full_start)
    return start, full_start, full_stop, stop


@triton.jit
def visible(
    offs_m, start_n, seqlen_q, seqlen_k, window, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr
):
    """The mask of a (rows, keys) tile."""
    offs_n = start_n + tl.arange(0, BLOCK_K)
    mask = offs_n[None, :] < seqlen_k
    if CAUSAL:
        last = offs_m + (seqlen_k - seqlen_q)
        mask = mask & (offs_n[None, :] <= last[:, None])
        if WINDOWED:
            mask = mask & (offs_n[None, :] > last[:, None] - window)
    return mask


@triton.jit
def load_tile(
    base, start, stop, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr, RAGGED: tl.constexpr
):
    """Rows [start, start + BLOCK) of a matrix, zero outside [0, stop) x [0, WIDTH)."""
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_WIDTH)
    pointers = base + tl.cast(start, tl.int64) * stride + (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
    if RAGGED:
        mask = (start + rows < stop)[:, None]
        if WIDTH != BLOCK_WIDTH:
            mask = mask & (columns < WIDTH)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    if WIDTH != BLOCK_WIDTH:
        return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_tile(
    base, value, start, stop, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """Inverse of :func:`load_tile`: what lies outside is not written, and float16 saturates."""
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_WIDTH)
    pointers = base + tl.cast(start, tl.int64) * stride + (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
    mask = (start + rows < stop)[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointers, rounded(value, base.dtype.element_ty), mask=mask)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """``x`` in the type of the tile products; float16 saturates where it would overflow."""
    if DTYPE == tl.float16:
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x.to(DTYPE)


@triton.jit
def low_term(x, high, TERMS: tl.constexpr):
    """What rounding ``x`` to ``high`` lost, as a second term; an unused scalar with one of TERMS."""
    if TERMS == 2:
        return (x - high.to(tl.float32)).to(high.dtype)
    else:
        return tl.zeros([1], high.dtype)


@triton.jit
def representable(x, DTYPE: tl.constexpr, TERMS: tl.constexpr):
    """The value nearest to ``x`` that TERMS terms of DTYPE add up to, in float32."""
    high = rounded(x, DTYPE)
    return joined(high, low_term(x, high, TERMS), TERMS)


@triton.jit
def joined(high, low, TERMS: tl.constexpr):
    """The float32 value of one or two TERMS."""
    if TERMS == 2:
        return high.to(tl.float32) + low.to(tl.float32)
    else:
        return high.to(tl.float32)


@triton.jit
def row_product(high, low, column, TERMS: tl.constexpr, INPUT_PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """(high + low) . column^T, a (rows, keys) tile in float32; ``low`` is read only with two TERMS.

    WIDE takes the product in float64 and leaves it there.
    """
    if WIDE:
        return tl.dot(high.to(tl.float64), tl.trans(column.to(tl.float64)), out_dtype=tl.float64)
    else:
        product = tl.dot(high, tl.trans(column), input_precision=INPUT_PRECISION)
        if TERMS == 2:
            product = tl.dot(low, tl.trans(column), product, input_precision=INPUT_PRECISION)
        return product


@triton.jit
def wide_dot(x, y, WIDE: tl.constexpr):
    """Row-wise inner product of two (rows, head_dim) tiles, in float64 where WIDE."""
    if WIDE:
        return tl.sum(x.to(tl.float64) * y.to(tl.float64), axis=1)
    else:
        return tl.sum(x * y, axis=1)


@triton.jit
def accumulate(total, high, low, column, TERMS: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """total + (high + low) @ column; ``low`` is read only with two TERMS."""
    total = tl.dot(high, column, total, input_precision=INPUT_PRECISION)
    if TERMS == 2:
        total = tl.dot(low, column, total, input_precision=INPUT_PRECISION)
    return total
