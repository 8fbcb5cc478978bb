"""Hand-written Triton building blocks of decoding: slots of a cache, dense or in pages, and rows of grouped queries."""

import triton
import triton.language as tl

from lla_compile.backends.triton.primitives import rounded


@triton.jit
def cached_rows(table_ptr, n, stop, stride_page, stride_n, PAGE_SIZE: tl.constexpr):
    """Offsets of the cache slots ``n``, through the table of pages if there is one."""
    if PAGE_SIZE == 0:
        return n.to(tl.int64) * stride_n
    else:
        page = tl.load(table_ptr + n // PAGE_SIZE, mask=n < stop, other=0).to(tl.int64)
        return page * stride_page + (n % PAGE_SIZE).to(tl.int64) * stride_n


@triton.jit
def load_cached(base, rows, first_column, seen, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, RAGGED: tl.constexpr):
    """Columns of cache slots, zero where a slot is not seen or a column is beyond WIDTH."""
    columns = first_column + tl.arange(0, BLOCK_WIDTH)
    mask = seen[:, None]
    if RAGGED:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(base + rows[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def cached_length(seqlens_ptr, batch, capacity):
    """Keys of a sequence, new ones included: all slots where no lengths are given."""
    length = capacity
    if seqlens_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(seqlens_ptr + batch), 0), capacity)
    return length


@triton.jit
def grouped_rows(rows, seqlen_q, stride_h, stride_n):
    """Offsets of rows that number the queries of a group of heads, head by head."""
    return (rows // seqlen_q).to(tl.int64) * stride_h + (rows % seqlen_q).to(tl.int64) * stride_n


@triton.jit
def load_grouped(base, offsets, valid, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """A tile of rows at ``offsets``, zero outside ``valid`` x [0, WIDTH)."""
    columns = tl.arange(0, BLOCK_WIDTH)
    mask = valid[:, None] & (columns < WIDTH)[None, :]
    return tl.load(base + offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_grouped(base, offsets, value, valid, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Inverse of :func:`load_grouped`: what lies outside is not written, and float16 saturates."""
    columns = tl.arange(0, BLOCK_WIDTH)
    mask = valid[:, None] & (columns < WIDTH)[None, :]
    tl.store(base + offsets[:, None] + columns[None, :], rounded(value, base.dtype.element_ty), mask=mask)
