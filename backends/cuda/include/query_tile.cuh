// Which tile of query rows a block holds, which keys it sees, and where its inputs are.
#pragma once
#include <sweep_arguments.cuh>
#include <tile.cuh>

// Tiles of BLOCK_K keys, counted from the first one that the block streams: some row sees [begin, end), and every row
// sees all keys of [full_begin, full_end).
struct TileRange {
    int begin, full_begin, full_end, end;

    DEVICE bool cuts(int tile) const { return tile < full_begin || tile >= full_end; }
};

struct QueryTile {
    int64_t batch, head;
    int first_row;           // of the block within its sequence
    int queries, keys;       // lengths of the sequence
    int64_t q_start, k_start;  // of the sequence among packed ones
    int64_t memory_row;      // of its first query, where tensors are dense
    int first_key, key_tiles;
    int shift, window;

    DEVICE QueryTile(const SweepArguments& g, int program) {
        int tiles = PACKED ? g.seqlen_q / BLOCK_Q + g.num_sequences : (g.seqlen_q + BLOCK_Q - 1) / BLOCK_Q;
        // Heads run in groups whose keys and values fit in the L2 cache together; within a group all heads have a tile
        // of one rank before any has the next.
        int group = program / (tiles * g.heads_per_group), first_head = group * g.heads_per_group;
        int size = min(g.batch_heads - first_head, g.heads_per_group);
        int local = program - group * (tiles * g.heads_per_group);
        int index = first_head + local % size, rank = local / size;
        batch = index / g.num_heads, head = index % g.num_heads;
        // The longest causal rows go first, so that short ones fill the tail; before all the first tile, whose rows
        // take the most iterations.
        int tile = CAUSAL && rank ? tiles - rank : rank;
        q_start = k_start = 0;
        queries = g.seqlen_q, keys = g.seqlen_k;
        if (PACKED) {
            // See tile_order.cu; a rank beyond the last tile gets no queries and no keys.
            int sequence = g.row_tiles[2 * rank];
            tile = g.row_tiles[2 * rank + 1];
            bool exists = sequence >= 0;
            q_start = exists ? g.cu_seqlens_q[sequence] : 0, k_start = exists ? g.cu_seqlens_k[sequence] : 0;
            queries = exists ? g.cu_seqlens_q[sequence + 1] - int(q_start) : 0;
            keys = exists ? g.cu_seqlens_k[sequence + 1] - int(k_start) : 0;
        }
        memory_row = int64_t(index) * g.seqlen_q + q_start;
        first_row = tile * BLOCK_Q;
        shift = keys - queries, window = g.window;
        TileRange range = tiles_of<BLOCK_Q>(first_row, 0);
        first_key = range.begin * BLOCK_K;
        key_tiles = range.end - range.begin;
    }

    // The tiles that ROWS rows from `row` on see, counted from `first_tile`.
    template <int ROWS>
    DEVICE TileRange tiles_of(int row, int first_tile) const {
        int last = min(row + ROWS, queries) - 1;
        if (last < row) return {0, 0, 0, 0};
        int start = 0, full_start = 0, full_stop = keys, stop = keys;
        if (CAUSAL) {
            stop = max(last + shift + 1, 0);
            full_stop = max(row + shift + 1, 0);
            if (WINDOWED) {
                start = max(row + shift + 1 - window, 0);
                full_start = max(last + shift + 1 - window, 0);
            }
        }
        TileRange range;
        range.end = (stop + BLOCK_K - 1) / BLOCK_K;
        range.begin = min(start / BLOCK_K, range.end);
        range.full_begin = min((full_start + BLOCK_K - 1) / BLOCK_K, range.end);
        range.full_end = max(full_stop / BLOCK_K, range.full_begin);
        return {range.begin - first_tile, range.full_begin - first_tile, range.full_end - first_tile,
                range.end - first_tile};
    }

    // The keys that a row sees, [first_seen, seen_stop).
    DEVICE int seen_stop(int row) const { return CAUSAL ? min(row + shift + 1, keys) : keys; }
    DEVICE int first_seen(int row) const { return WINDOWED ? row + shift + 1 - window : 0; }

    DEVICE Cache cache(const uint16_t* base, const int64_t (&strides)[3], int64_t of_head, int64_t start) const {
        return {base + batch * strides[0] + of_head * strides[1] + start * strides[2], 0, strides[2]};
    }
    template <class T>
    DEVICE T* result(T* base, const int64_t (&strides)[3]) const {
        return base ? base + batch * strides[0] + head * strides[1] + q_start * strides[2] : nullptr;
    }
    DEVICE Slots slots(int tile) const { return {first_key + tile * BLOCK_K, 0, keys, nullptr}; }
};
