// Which rows and keys a block of decoding in parts has, and which keys a row of it sees.
#pragma once
#include <part_arguments.cuh>
#include <tile.cuh>

constexpr int ROWS = 8;  // of a warp: the columns of a product of values and weights
constexpr int ROW_WARPS = BLOCK_Q / ROWS;
constexpr int KEY_WARPS = WARPS / ROW_WARPS;
constexpr int THREADS = 32 * WARPS;
constexpr int TILE = KEY_WARPS * BLOCK_K;  // keys of a tile, of which every one of KEY_WARPS has its own BLOCK_K

// Blocks of one part of a key head's keys follow each other, to share them in the L2 cache.
struct PartTile {
    int kv;                // sequence and key head
    int first_row, rows;   // of a group's rows, and how many there are
    int split;
    int length;            // keys of the sequence
    int first_seen;        // by any row
    int start, stop;       // the keys of this part: whole tiles, but for the last one
    int full_start, full_stop;  // every row sees all keys between them

    DEVICE PartTile(const PartArguments& g, int index) {
        rows = g.group_size * g.seqlen_q;
        int row_tiles = (rows + BLOCK_Q - 1) / BLOCK_Q;
        first_row = index % row_tiles * BLOCK_Q;
        split = index / row_tiles % g.num_splits;
        kv = index / row_tiles / g.num_splits;
        length = g.capacity;
        if (g.seqlens) length = min(max(g.seqlens[kv / g.num_kv_heads], 0), g.capacity);
        first_seen = first_key(g, 0), full_start = first_key(g, g.seqlen_q - 1), full_stop = key_stop(g, 0);
        int first_tile = first_seen / TILE;
        int tiles = ((length + TILE - 1) / TILE - first_tile + g.num_splits - 1) / g.num_splits;
        start = (first_tile + split * tiles) * TILE;
        stop = min(start + tiles * TILE, length);
    }

    // The keys that a token sees.
    DEVICE int key_stop(const PartArguments& g, int token) const { return max(length - (g.seqlen_q - 1 - token), 0); }
    DEVICE int first_key(const PartArguments& g, int token) const {
        return g.window ? max(key_stop(g, token) - g.window, 0) : 0;
    }

    DEVICE int tiles() const { return stop > start ? (stop - start + TILE - 1) / TILE : 0; }
    // Whether some row does not see all BLOCK_K keys from `first` on.
    DEVICE bool cuts(int first) const { return first < full_start || first + BLOCK_K > full_stop; }

    DEVICE Cache cache(const PartArguments& g, const uint16_t* base, const int64_t (&strides)[3]) const {
        int64_t page_batch = PAGE_SIZE ? 0 : kv / g.num_kv_heads;
        return {base + page_batch * strides[0] + kv % g.num_kv_heads * strides[1], strides[0], strides[2]};
    }
    DEVICE const int32_t* table(const PartArguments& g) const {
        return PAGE_SIZE ? g.block_table + kv / g.num_kv_heads * g.table_stride : nullptr;
    }
};
