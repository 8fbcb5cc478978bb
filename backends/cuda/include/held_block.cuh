// Which query rows or keys a block holds, which of the other side it streams past them, and where they are in memory.
#pragma once
#include <row_table.cuh>
#include <tile.cuh>
#include <vector.cuh>

// Tiles of BLOCK_K of the streamed side, counted from the first one that the block streams: some of those held sees
// [begin, end), and all of them see all of [full_begin, full_end).
struct StreamRange {
    int begin, full_begin, full_end, end;

    DEVICE bool cuts(int tile) const { return tile < full_begin || tile >= full_end; }
};

// Where the sequence of a block begins among packed ones: on either side, and in the table of row numbers. Sequences
// that are not packed begin at 0, which takes no room.
template <bool>
struct SequenceStart {
    static constexpr int held_start = 0, streamed_start = 0, table_start = 0;

    DEVICE void set_starts(int, int, int) {}
};
template <>
struct SequenceStart<true> {
    int held_start, streamed_start, table_start;

    DEVICE void set_starts(int held, int streamed, int table) {
        held_start = held, streamed_start = streamed, table_start = table;
    }
};

struct HeldBlock : SequenceStart<PACKED> {
    int64_t batch, head;     // of the held side
    int64_t streamed_head;   // the first one that is streamed
    int first;               // of those held, within their sequence
    int held, streamed;      // lengths of the sequence
    int64_t memory_row;      // of the sequence's first query, where tensors are dense
    int first_tile, tiles;   // streamed past the block, for each head
    int shift, window;

    DEVICE HeldBlock(const SweepArguments& g, int program) {
        held = HOLDS_KEYS ? g.seqlen_k : g.seqlen_q, streamed = HOLDS_KEYS ? g.seqlen_q : g.seqlen_k;
        shift = g.seqlen_k - g.seqlen_q, window = g.window;
        int blocks = PACKED ? held / HELD_ROWS + g.num_sequences : (held + HELD_ROWS - 1) / HELD_ROWS;
        int heads = HOLDS_KEYS ? g.num_heads / g.group_size : g.num_heads;
        int batch_heads = HOLDS_KEYS ? g.batch_heads / g.group_size : g.batch_heads;
        // Heads run in groups whose streamed operands fit in the L2 cache together; within a group all heads have a
        // block of one rank before any has the next.
        int together = HOLDS_KEYS ? g.key_heads_together : g.row_heads_together;
        int group = program / (blocks * together), first_head = group * together;
        int size = min(batch_heads - first_head, together), local = program - group * (blocks * together);
        int index = first_head + local % size, rank = local / size;
        batch = index / heads, head = index % heads;
        streamed_head = HOLDS_KEYS ? head * g.group_size : index % heads / g.group_size;
        // What sees most goes first, so that short blocks fill the tail: causal rows are many at the end, keys' at the
        // beginning.
        int tile = CAUSAL && !HOLDS_KEYS ? blocks - 1 - rank : rank;
        if (PACKED) tile = enter_sequence(g, (HOLDS_KEYS ? g.key_tiles : g.row_tiles) + 2 * rank);
        memory_row = int64_t(index) * g.seqlen_q + held_start;
        first = tile * HELD_ROWS;
        first_tile = 0;
        StreamRange range = tiles_of<HELD_ROWS>(first);
        first_tile = range.begin, tiles = range.end - range.begin;
    }

    // The tile that the table has at `entry`, see backward_order.cu; beyond the last tile one of an empty sequence.
    DEVICE int enter_sequence(const SweepArguments& g, const int32_t* entry) {
        int sequence = entry[0];
        const int32_t* held_ends = HOLDS_KEYS ? g.cu_seqlens_k : g.cu_seqlens_q;
        const int32_t* streamed_ends = HOLDS_KEYS ? g.cu_seqlens_q : g.cu_seqlens_k;
        bool exists = sequence >= 0;
        int from = exists ? held_ends[sequence] : 0, streamed_from = exists ? streamed_ends[sequence] : 0;
        held = exists ? held_ends[sequence + 1] - from : 0;
        streamed = exists ? streamed_ends[sequence + 1] - streamed_from : 0;
        shift = HOLDS_KEYS ? held - streamed : streamed - held;
        set_starts(from, streamed_from, exists ? table_start_of(g, sequence) : 0);
        return entry[1];
    }

    // Row i sees key j if j <= i + shift and, with a window, j > i + shift - window. Those of the streamed side that
    // number i of the held one sees are [first_seen, seen_stop).
    static constexpr bool HAS_START = HOLDS_KEYS ? CAUSAL : WINDOWED, HAS_STOP = HOLDS_KEYS ? WINDOWED : CAUSAL;

    DEVICE int within(int x) const { return min(max(x, 0), streamed); }
    DEVICE int first_seen(int i) const {
        return HAS_START ? within(HOLDS_KEYS ? i - shift : i + shift + 1 - window) : 0;
    }
    DEVICE int seen_stop(int i) const {
        return HAS_STOP ? within(HOLDS_KEYS ? i - shift + window : i + shift + 1) : streamed;
    }

    // The tiles that ROWS of the held side from `row` on see.
    template <int ROWS>
    DEVICE StreamRange tiles_of(int row) const {
        int last = min(row + ROWS, held) - 1;
        if (last < row) return {0, 0, 0, 0};
        int stop = seen_stop(last), full_stop = seen_stop(row);
        int end = (stop + BLOCK_K - 1) / BLOCK_K, begin = min(first_seen(row) / BLOCK_K, end);
        int full_begin = min((first_seen(last) + BLOCK_K - 1) / BLOCK_K, end);
        // Rows beyond the last one have no weight, whereas keys have to be hidden.
        int full_end = max(HOLDS_KEYS && full_stop == streamed ? end : full_stop / BLOCK_K, full_begin);
        return {begin - first_tile, full_begin - first_tile, full_end - first_tile, end - first_tile};
    }

    template <class T>
    DEVICE T* of_head(T* base, const int64_t (&strides)[3]) const {
        return base ? base + batch * strides[0] + head * strides[1] + held_start * strides[2] : nullptr;
    }
    // The streamed side, of one of the heads that are streamed.
    DEVICE Cache streamed_cache(const uint16_t* base, const int64_t (&strides)[3], int number) const {
        const uint16_t* of_head = base + batch * strides[0] + (streamed_head + number) * strides[1];
        return {of_head + streamed_start * strides[2], 0, strides[2]};
    }
};

// Of the held side, those of a warp; all of it follows from the block, and takes no registers.
struct HeldRows {
    const HeldBlock& block;

    DEVICE static int lane() { return threadIdx.x % 32; }
    DEVICE static int column(int n) { return 8 * n + 2 * (lane() % 4); }
    DEVICE int number(int r) const {
        int thread = thread_anew();
        return block.first + thread / 32 * 16 + thread % 32 / 4 + 8 * r;
    }
    DEVICE bool exists(int r) const { return number(r) < block.held; }
    DEVICE int64_t memory_row(int r) const { return block.memory_row + number(r); }
};
