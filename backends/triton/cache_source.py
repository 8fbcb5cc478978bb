"""Printing decoding's kernel: its rows are all queries that share a key head, its keys lie in a cache."""

from __future__ import annotations

from typing import Iterable

from lla_compile.backends.triton.kernel_source import RowKernelPrinter
from lla_compile.backends.triton.sweep_source import SweepPrinter

CACHE_HEADER = """\
import triton
import triton.language as tl

from lla_compile.backends.triton.cache_primitives import (
    cached_length,
    cached_rows,
    grouped_rows,
    load_cached,
    load_grouped,
    store_grouped,
)
from lla_compile.backends.triton.primitives import (
    accumulate,
    joined,
    key_segments,
    low_term,
    representable,
    rounded,
    score_product,
    store_rows,
    visible,
    wide_dot,
)
"""


class _CachedSweepPrinter(SweepPrinter):
    """Streams slots of a cache: those that no query sees may hold anything, in any segment."""

    def load_streamed_columns(self, names: Iterable[str]) -> None:
        out = self.out
        out.add("slots = start_n + tl.arange(0, BLOCK_K)")
        out.add("seen = (slots >= first_seen) & (slots < seqlen_k)")
        for name in names:
            width, block = self.width(name)
            out.add(
                f"{name}_slots = cached_rows(table, slots, seqlen_k, {name}_stride_b, {name}_stride_n, PAGE_SIZE)"
            )
            out.add(f"{name} = load_cached({name}_base, {name}_slots, 0, seen, {width}, {block}, {width} != {block})")


class CachedRowKernelPrinter(RowKernelPrinter):
    """Rows number the queries of a group of heads, head by head, so that the group reads its keys once.

    A row's query number, which the mask looks at, is its place in its head. Nothing but outputs is stored.
    """

    own_constexprs = ("PAGE_SIZE",)
    sweep_printer = _CachedSweepPrinter
    rows_stop = "num_rows"

    def _opening(self) -> None:
        out, program = self.out, self.program
        out.add(
            """\
num_rows = group_size * seqlen_q
num_tiles = tl.cdiv(num_rows, BLOCK_Q)
bh = tl.program_id(0) // num_tiles
start_m = tl.program_id(0) % num_tiles * BLOCK_Q
batch = (bh // num_kv_heads).to(tl.int64)
kv_head = (bh % num_kv_heads).to(tl.int64)
first_row = bh.to(tl.int64) * num_rows
rows = start_m + tl.arange(0, BLOCK_Q)
row_valid = rows < num_rows
offs_m = rows % seqlen_q
seqlen_k = cached_length(seqlens_ptr, batch, capacity)
start, full_start, full_stop, stop = key_segments(
    0, seqlen_q, seqlen_k, window, BLOCK_Q, BLOCK_K, CAUSAL, WINDOWED
)
first_seen = tl.maximum(seqlen_k - seqlen_q + 1 - window, 0) if WINDOWED else 0
page_batch = batch
table = block_table_ptr
if PAGE_SIZE != 0:
    page_batch = batch * 0
    table = block_table_ptr + batch * table_stride"""
        )
        self._scale()
        for name in program.row_scalars:
            out.add(f"{name}_rows = tl.full([BLOCK_Q], 1.0, tl.float32) * {name}")
            out.open(f"if {name.upper()}_TENSOR:")
            self._row_offsets(name)
            out.add(f"{name}_rows = tl.load({name}_base + {name}_offsets, mask=row_valid, other=1.0)")
            out.close()
        for name in program.row_inputs:
            self._row_offsets(name)
            width, block = self.sweeps.width(name)
            out.add(f"{name} = load_grouped({name}_base, {name}_offsets, row_valid, {width}, {block})")
        for name in program.col_inputs:
            out.add(f"{name}_base = {name}_ptr + page_batch * {name}_stride_b + kv_head * {name}_stride_h")

    def _row_offsets(self, name: str) -> None:
        """Where the rows of this tile lie in a tensor of the caller's."""
        out = self.out
        out.add(f"{name}_base = {name}_ptr + batch * {name}_stride_b + kv_head * group_size * {name}_stride_h")
        out.add(f"{name}_offsets = grouped_rows(rows, seqlen_q, {name}_stride_h, {name}_stride_n)")

    def _store_strided(self, name: str) -> None:
        width, block = self.sweeps.width(name)
        self._row_offsets(name)
        self.out.add(f"store_grouped({name}_base, {name}_offsets, {name}, row_valid, {width}, {block})")
