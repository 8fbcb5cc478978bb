"""The order in which the tiles of packed sequences run, worked out on the device: the host never sees the lengths."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ELEMENTS = 8192  # of a (tiles, sequences) comparison that a program holds at once


def max_tiles(total: int, num_sequences: int, block: int) -> int:
    """The most tiles of ``block`` rows that sequences of ``total`` rows can have."""
    return total // block + num_sequences


def tile_table(
    cu_seqlens_held: torch.Tensor,
    cu_seqlens_streamed: torch.Tensor,
    total: int,
    block: int,
    is_causal: bool,
    holds: str,
) -> torch.Tensor:
    """(sequence, tile) by rank, int32 (max_tiles, 2): tiles with most work first, (-1, 0) where there is none.

    Args:
        cu_seqlens_held: where the sequences of the held side start and end, int32 (sequences + 1).
        cu_seqlens_streamed: the same of the streamed side.
        total: rows of the held side.
        block: rows of a tile.
        is_causal: whether the work depends on the place in the sequence.
        holds: "rows" or "keys".
    """
    num_sequences = cu_seqlens_held.shape[0] - 1
    count = max_tiles(total, num_sequences, block)
    table = torch.empty(count, 2, dtype=torch.int32, device=cu_seqlens_held.device)
    padded = triton.next_power_of_2(num_sequences)
    tiles = max(1, min(64, _ELEMENTS // padded))
    _tile_table[(triton.cdiv(count, tiles),)](
        cu_seqlens_held,
        cu_seqlens_streamed,
        table,
        num_sequences,
        count,
        BLOCK=block,
        CAUSAL=is_causal,
        HOLDS_ROWS=holds == "rows",
        SEQUENCES=padded,
        TILES=tiles,
    )
    return table


@triton.jit
def _work(
    number, starts, tiles_before, tile_ends, held, streamed, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    HOLDS_ROWS: tl.constexpr,
):  # fmt: skip
    """Sequence, tile and work (rows of the streamed side) of tile numbers; work -1 beyond the last tile.

    The first query tile of a sequence goes before all: its rows take the most CG iterations.
    """
    inside = (tiles_before[None, :] <= number[:, None]) & (number[:, None] < tile_ends[None, :])
    exists = tl.sum(inside.to(tl.int32), axis=1) > 0
    sequence = tl.sum(tl.where(inside, starts[None, :], 0), axis=1)
    tile = number - tl.sum(tl.where(inside, tiles_before[None, :], 0), axis=1)
    held_length = tl.sum(tl.where(inside, held[None, :], 0), axis=1)
    length = tl.sum(tl.where(inside, streamed[None, :], 0), axis=1)
    work = length
    if CAUSAL:
        if HOLDS_ROWS:
            work = tl.minimum(length, (tile + 1) * BLOCK + length - held_length)
            work = tl.where(tile == 0, 1 << 30, work)
        else:
            work = tl.minimum(length, held_length - tile * BLOCK)
    return tl.where(exists, sequence, -1), tl.where(exists, tile, 0), tl.where(exists, tl.maximum(work, 0), -1)


@triton.jit
def _tile_table(
    held_ptr, streamed_ptr, table_ptr, num_sequences, count, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
    HOLDS_ROWS: tl.constexpr, SEQUENCES: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Every program ranks its tiles against all: by work, then by number."""
    sequences = tl.arange(0, SEQUENCES)
    exists = sequences < num_sequences
    held = tl.load(held_ptr + sequences + 1, mask=exists, other=0) - tl.load(held_ptr + sequences, mask=exists, other=0)
    streamed = tl.load(streamed_ptr + sequences + 1, mask=exists, other=0)
    streamed -= tl.load(streamed_ptr + sequences, mask=exists, other=0)
    tiles = (held + BLOCK - 1) // BLOCK
    tile_ends = tl.cumsum(tiles, axis=0)
    tiles_before = tile_ends - tiles
    mine = tl.program_id(0) * TILES + tl.arange(0, TILES)
    sequence, tile, work = _work(mine, sequences, tiles_before, tile_ends, held, streamed, BLOCK, CAUSAL, HOLDS_ROWS)
    rank = tl.zeros([TILES], tl.int32)
    for first in tl.range(0, count, TILES):
        others = first + tl.arange(0, TILES)
        _, _, theirs = _work(others, sequences, tiles_before, tile_ends, held, streamed, BLOCK, CAUSAL, HOLDS_ROWS)
        before = (theirs[None, :] > work[:, None]) | (
            (theirs[None, :] == work[:, None]) & (others[None, :] < mine[:, None])
        )
        before = before & (others < count)[None, :]
        rank += tl.sum(before.to(tl.int32), axis=1)
    valid = mine < count
    tl.store(table_ptr + 2 * rank, sequence, mask=valid)
    tl.store(table_ptr + 2 * rank + 1, tile, mask=valid)
