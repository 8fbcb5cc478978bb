"""Hand-written Triton building blocks that the generated kernels compose."""

import triton
import triton.language as tl


@triton.jit
def program_head(pid, num_tiles, batch_heads, heads_per_group):
    """Map a program to a head and a rank among the tiles of that head.

    Heads run in groups whose streamed operands fit in the L2 cache together; within a group all heads have a tile of
    one rank before any has the next.
    """
    group = pid // (num_tiles * heads_per_group)
    first_head = group * heads_per_group
    size = tl.minimum(batch_heads - first_head, heads_per_group)
    local = pid - group * (num_tiles * heads_per_group)
    return first_head + local % size, local // size


@triton.jit
def row_tile(rank, num_tiles, CAUSAL: tl.constexpr):
    """The query tile of a rank: the longest causal rows go first, so that short ones fill the tail.

    The first tile goes before all: its rows see fewer keys than head_dim, their covariance is singular and they take
    the most CG iterations.
    """
    tile = rank
    if CAUSAL:
        tile = tl.where(rank == 0, 0, num_tiles - rank)
    return tile


@triton.jit
def packed_tile(tiles_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, rank):
    """The tile of a rank among packed sequences: its number in the sequence, and where queries and keys start and stop.

    A rank beyond the last tile has sequence -1, and gets no queries and no keys.
    """
    sequence = tl.load(tiles_ptr + 2 * rank)
    tile = tl.load(tiles_ptr + 2 * rank + 1)
    exists = sequence >= 0
    q_start = tl.load(cu_seqlens_q_ptr + sequence, mask=exists, other=0)
    k_start = tl.load(cu_seqlens_k_ptr + sequence, mask=exists, other=0)
    q_stop = tl.load(cu_seqlens_q_ptr + sequence + 1, mask=exists, other=0)
    k_stop = tl.load(cu_seqlens_k_ptr + sequence + 1, mask=exists, other=0)
    return tile, q_start, q_stop - q_start, k_start, k_stop - k_start


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
def query_segments(
    start_n,
    seqlen_q,
    seqlen_k,
    window,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Bounds of the queries that see a key tile: (start, full_start, full_stop, stop).

    Tiles in [full_start, full_stop) see every key of the tile and lie within the sequence, those before and after need
    the mask.
    """
    start = 0
    full_start = 0
    stop = seqlen_q
    full_stop = seqlen_q
    if CAUSAL:
        shift = seqlen_k - seqlen_q
        last_n = tl.minimum(start_n + BLOCK_K, seqlen_k) - 1
        start = tl.maximum(start_n - shift, 0) // BLOCK_Q * BLOCK_Q
        full_start = tl.cdiv(tl.maximum(last_n - shift, 0), BLOCK_Q) * BLOCK_Q
        if WINDOWED:
            stop = tl.maximum(tl.minimum(last_n - shift + window, seqlen_q), 0)
            full_stop = tl.maximum(tl.minimum(start_n - shift + window, seqlen_q), 0)
    full_start = tl.minimum(full_start, tl.cdiv(stop, BLOCK_Q) * BLOCK_Q)
    full_stop = tl.maximum(full_stop // BLOCK_Q * BLOCK_Q, full_start)
    return start, full_start, full_stop, stop


@triton.jit
def visible(m, n, seqlen_q, seqlen_k, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """The mask of a tile from its query numbers ``m`` and key numbers ``n``, which broadcast against each other."""
    mask = n < seqlen_k
    if CAUSAL:
        last = m + (seqlen_k - seqlen_q)
        mask = mask & (n <= last)
        if WINDOWED:
            mask = mask & (n > last - window)
    return mask


@triton.jit
def load_rows(base, start, stop, other, BLOCK: tl.constexpr, RAGGED: tl.constexpr):
    """Numbers [start, start + BLOCK) of a row vector, ``other`` from ``stop`` on."""
    rows = start + tl.arange(0, BLOCK)
    if RAGGED:
        return tl.load(base + rows, mask=rows < stop, other=other)
    return tl.load(base + rows)


@triton.jit
def store_rows(base, value, start, stop, BLOCK: tl.constexpr):
    """Inverse of :func:`load_rows`: what lies beyond ``stop`` is not written."""
    rows = start + tl.arange(0, BLOCK)
    tl.store(base + rows, value.to(base.dtype.element_ty), mask=rows < stop)


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
def score_product(
    held_high,
    held_low,
    streamed_high,
    streamed_low,
    HELD_TERMS: tl.constexpr,
    STREAMED_TERMS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """held . streamed^T, each the sum of one or two terms, in float32; a low term is read only where there are two.

    WIDE takes the product in float64 and leaves it there.
    """
    if WIDE:
        return tl.dot(
            held_high.to(tl.float64), tl.trans(streamed_high.to(tl.float64)), out_dtype=tl.float64
        )
    else:
        product = tl.dot(held_high, tl.trans(streamed_high), input_precision=INPUT_PRECISION)
        if HELD_TERMS == 2:
            product = tl.dot(held_low, tl.trans(streamed_high), product, input_precision=INPUT_PRECISION)
        if STREAMED_TERMS == 2:
            product = tl.dot(held_high, tl.trans(streamed_low), product, input_precision=INPUT_PRECISION)
        return product


@triton.jit
def wide_dot(x, y, WIDE: tl.constexpr):
    """Row-wise inner product of two (rows, head_dim) tiles, in float64 where WIDE."""
    if WIDE:
        return tl.sum(x.to(tl.float64) * y.to(tl.float64), axis=1)
    else:
        return tl.sum(x * y, axis=1)


@triton.jit
def accumulate(
    total,
    weight_high,
    weight_low,
    operand_high,
    operand_low,
    TERMS: tl.constexpr,
    OPERAND_TERMS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """total + weight @ operand; the product of two low terms is below the accuracy of either and left out."""
    total = tl.dot(weight_high, operand_high, total, input_precision=INPUT_PRECISION)
    if TERMS == 2:
        total = tl.dot(weight_low, operand_high, total, input_precision=INPUT_PRECISION)
    if OPERAND_TERMS == 2:
        total = tl.dot(weight_high, operand_low, total, input_precision=INPUT_PRECISION)
    return total
