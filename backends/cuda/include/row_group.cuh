// Query rows of a block as its warps hold them, whichever instructions multiply: what is in shared memory, what groups of
// rows say to each other, and what a group knows of its rows. A group is GROUP_ROWS rows whose warps stream together.
#pragma once
#include <row_state.cuh>

constexpr int GROUP = 2 * GROUP_ROWS;  // threads: a warp has 16 rows
constexpr int GROUP_WARPS = GROUP / 32;
constexpr int ROW_GROUPS = BLOCK_Q / GROUP_ROWS;
constexpr int ROW_WARPS = ROW_GROUPS * GROUP_WARPS;
constexpr int STEPS = BLOCK_K / 16;
constexpr int STAGE_BYTES = KeyTile::BYTES > ValueTile::BYTES ? KeyTile::BYTES : ValueTile::BYTES;

using QueryRows = RowTile;
using Direction = Rounded;

constexpr int OPERANDS_OF_ROWS = ROW_INPUTS + (TERMS == 2 ? 2 : 0);
constexpr int OPERAND_BYTES = ROW_GROUPS * QueryRows::BYTES;
constexpr int PARKED_BYTES = ROW_WARPS * Parked<BLOCK_D>::BYTES_OF_WARP;

struct SharedRows {
    uint8_t stages[STAGES][STAGE_BYTES];
    // Rows of the inputs and the terms of a rounded vector, each in the order of groups; then vectors that wait.
    uint8_t rows[OPERANDS_OF_ROWS * OPERAND_BYTES + PARKED * PARKED_BYTES];
    float row_numbers[PARKED_ROWS > 0 ? PARKED_ROWS : 1][BLOCK_Q];
    int flags[2][ROW_WARPS];
    QueryTile tile;
};

template <bool VALUES>
struct Streamed {
    using Tile = KeyTile;
};
template <>
struct Streamed<true> {
    using Tile = ValueTile;
};
template <bool VALUES>
using StreamedTile = typename Streamed<VALUES>::Tile;

// What groups of rows still want, as bits: all threads of the block say so together, once before every turn of a loop.
// `shared.meet(parity)` returns once all of them have called it; parities alternate.
struct Flags {
    int mine, all;  // of the calling thread's group, and of any

    DEVICE bool wants(int bit) const { return mine >> bit & 1; }
    DEVICE bool none() const { return !all; }
};

template <class Shared>
DEVICE Flags vote(int flags, Shared& shared, int& parity) {
    int warp = threadIdx.x / 32, mine = 0, all = 0;
    if (warp < ROW_WARPS) {
        int seen = any_lane(flags);
        if (Rows::lane() == 0) shared.flags[parity][warp] = seen;
    }
    shared.meet(parity);
#pragma unroll
    for (int other = 0; other < ROW_WARPS; ++other) {
        int seen = shared.flags[parity][other];
        all |= seen;
        if (other / GROUP_WARPS == warp / GROUP_WARPS) mine |= seen;
    }
    parity ^= 1;
    return {any_lane(mine), any_lane(all)};
}

// A group, but for how keys are streamed past it.
struct RowGroup {
    const SweepArguments& g;
    SharedRows& shared;
    const QueryTile& tile;
    Rows rows;
    QueryRows q;
    float scale_log2;
    int parity = 0;

    DEVICE RowGroup(const SweepArguments& g, SharedRows& shared)
        : g(g), shared(shared), tile(shared.tile), rows{shared.tile} {
        q = input(0);
        scale_log2 = (g.scale_pointer ? *g.scale_pointer : g.scale) * LOG2_E;
#pragma unroll
        for (int i = 0; i < ROW_INPUTS; ++i) {
            RowInput from = row_input(g, i);
            load(i ? input(i) : q, tile.cache(from.base, from.strides, tile.head, tile.q_start),
                 tile.first_row + GROUP_ROWS * number());
        }
        commit_copies();
        wait_copies<0>();
    }

    // Of the group in its block; the compiler knows that all lanes have the same.
    DEVICE static int number() { return uniform(thread_anew() / GROUP); }

    // The group's rows of an input, in the order that `row_input` has them.
    DEVICE QueryRows input(int i) const {
        return {shared.rows + i * OPERAND_BYTES + number() * QueryRows::BYTES, threadIdx.x / 32 % GROUP_WARPS * 16};
    }
    DEVICE void load(const QueryRows& to, const Cache& from, int first) const {
        constexpr int CHUNKS = BLOCK_D / CHUNK;
#pragma unroll 1
        for (int at = threadIdx.x % GROUP; at < GROUP_ROWS * CHUNKS; at += GROUP) {
            int row = at / CHUNKS, chunk = at % CHUNKS, left = HEAD_DIM - chunk * CHUNK;
            TileCopy<KeyTile, GROUP>::copy_chunk(shared_address(to.tile) + QueryRows::offset(row, chunk),
                                                 from.base + (first + row) * from.row_stride + chunk * CHUNK,
                                                 first + row < tile.queries, left < CHUNK ? left > 0 ? left : 0 : CHUNK);
        }
    }

    // Row numbers that are given as one number or as a tensor.
    DEVICE Row given(const float* from, float number_of_all, const int64_t (&strides)[3]) const {
        Row made;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            made[r] = number_of_all;
            if (from && rows.exists(r)) {
                made[r] = from[tile.batch * strides[0] + tile.head * strides[1] +
                               (tile.q_start + rows.number(r)) * strides[2]];
            }
        }
        return made;
    }

    DEVICE uint8_t* parked(int vector) const {
        return shared.rows + OPERANDS_OF_ROWS * OPERAND_BYTES + vector * PARKED_BYTES +
               threadIdx.x / 32 * Parked<BLOCK_D>::BYTES_OF_WARP;
    }
    DEVICE float* parked_row(int slot) const { return shared.row_numbers[slot]; }
    DEVICE Direction rounded() const {
        Direction made;
        made.high = {q.tile + (TERMS == 2 ? ROW_INPUTS : 0) * OPERAND_BYTES, q.first};
        made.low = {q.tile + (TERMS == 2 ? ROW_INPUTS + 1 : 0) * OPERAND_BYTES, q.first};
        return made;
    }

    // Scores of pairs that do not see each other become -inf.
    DEVICE void mask(float (&s)[BLOCK_K / 8][4], int at) {
        int first = tile.first_key + at * BLOCK_K + Rows::column(0);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int stop = tile.seen_stop(rows.number(r)) - first, start = tile.first_seen(rows.number(r)) - first;
#pragma unroll
            for (int n = 0; n < BLOCK_K / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    int key = 8 * n + i;
                    bool seen = key < stop && (!WINDOWED || key >= start);
                    if (!seen) s[n][2 * r + i] = -INFINITE;
                }
            }
        }
    }
};
