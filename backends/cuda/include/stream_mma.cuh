// Streaming keys past query rows with the matrix instructions of one warp (mma.sync), for compute capability 8.0 on.
//
// All warps hold rows, and together copy tiles of keys and values into a ring of stages, as far ahead as the ring is long.
// Scores of two products take every key from shared memory once.
#pragma once
#include <operands_mma.cuh>
#include <weights.cuh>

constexpr int THREADS = GROUP;

struct Shared : SharedRows {
    DEVICE void meet(int) { sync_block(); }
};

// The rows of a block and the sweeps that stream keys past them.
struct Group : RowGroup {
    Shared& shared;

    DEVICE Group(const SweepArguments& g, Shared& shared) : RowGroup(g, shared), shared(shared) { sync_block(); }

    DEVICE Flags vote(int flags) { return ::vote(flags, shared, parity); }

    // There is one group, which takes part in every pass.
    template <bool VALUES>
    DEVICE void pass_stream() {}

    // ---- copies ----

    template <class T>
    DEVICE void copy_tile(const uint16_t* base, const int64_t (&strides)[3], int tile_number, uint32_t stage) const {
        Cache cache = tile.cache(base, strides, tile.head / g.group_size, tile.k_start);
        TileCopy<T, THREADS> copy(thread_anew());
        constexpr int NO_PAGES[TileCopy<T, THREADS>::COUNT] = {};
        copy.start(stage, cache, tile.slots(tile_number), NO_PAGES);
    }

    // The tiles of a pass in order, keys or keys and values in turns, with STAGES - 1 of them under way.
    template <bool VALUES>
    struct Ring {
        const Group& group;
        int copied = 0, to = 0, from = 0;

        DEVICE explicit Ring(const Group& group) : group(group) {
#pragma unroll 1
            for (int i = 0; i < STAGES - 1; ++i) copy();
        }

        DEVICE uint32_t stage(int number) const { return shared_address(group.shared.stages[0]) + number * STAGE_BYTES; }
        DEVICE static int after(int number) { return number + 1 == STAGES ? 0 : number + 1; }

        DEVICE void copy() {
            int number = VALUES ? copied / 2 : copied;
            if (number < group.tile.key_tiles) {
                if (VALUES && copied % 2) {
                    group.copy_tile<ValueTile>(group.g.v, group.g.v_strides, number, stage(to));
                } else {
                    group.copy_tile<KeyTile>(group.g.k, group.g.k_strides, number, stage(to));
                }
            }
            commit_copies();
            ++copied, to = after(to);
        }

        // The next tile, which is there for all threads; the stage of the one before it is filled anew.
        DEVICE uint32_t next() {
            wait_copies<STAGES - 2>();
            sync_block();
            copy();
            uint32_t found = stage(from);
            from = after(from);
            return found;
        }

        DEVICE void end() {
            wait_copies<0>();
            sync_block();
        }
    };

    // ---- products ----

    // s = q . k and, with SECOND, t = row . k in T terms.
    template <int T, bool SECOND>
    DEVICE void multiply_rows(float (&s)[BLOCK_K / 8][4], float (&t)[BLOCK_K / 8][4], const Direction* row,
                              uint32_t keys) const {
#pragma unroll
        for (int n = 0; n < BLOCK_K / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] = t[n][i] = 0;
        }
#pragma unroll
        for (int step = 0; step < BLOCK_D / 16; ++step) {
            uint32_t query[4], terms[T][4];
            load_matrices(query, left_operand(q, 2 * step));
            if constexpr (SECOND && !Direction::IN_REGISTERS) {
                load_matrices(terms[0], left_operand(row->high, 2 * step));
                if constexpr (T == 2) load_matrices(terms[1], left_operand(row->low, 2 * step));
            }
#pragma unroll
            for (int n = 0; n < BLOCK_K / 16; ++n) {
                uint32_t key[4];
                load_matrices(key, columns_operand<KeyTile>(keys, 16 * n, 2 * step));
                multiply_pair(s[2 * n], s[2 * n + 1], query, key);
                if constexpr (SECOND && Direction::IN_REGISTERS) {
                    multiply_pair(t[2 * n], t[2 * n + 1], row->registers[step], key);
                } else if constexpr (SECOND) {
#pragma unroll
                    for (int term = 0; term < T; ++term) multiply_pair(t[2 * n], t[2 * n + 1], terms[term], key);
                }
            }
        }
    }

    template <class T, int COUNT, int WIDTH>
    DEVICE void add_sum(Vector<WIDTH>& sum, const Weights<COUNT>& weights, uint32_t operand) const {
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
#pragma unroll
            for (int n = 0; n < WIDTH / 16; ++n) {
                uint32_t b[4];
                load_matrices_transposed(b, rows_operand<T>(operand, 16 * step, 2 * n));
#pragma unroll
                for (int term = 0; term < COUNT; ++term) {
                    multiply_pair(sum.x[2 * n], sum.x[2 * n + 1], weights.of[term][step], b);
                }
            }
        }
    }

    // One pass over the keys, see stream_wgmma.cuh. A warp leaves out the tiles that none of its rows sees.
    template <int T, bool SECOND, bool VALUES, int WIDTH, class Softmax, class F>
    DEVICE void stream(Vector<WIDTH>& sum, Softmax& softmax, Direction* row, const Row& center, F weight) {
        using Operands = StreamedTile<VALUES>;
        int first = tile.first_row + uniform(thread_anew() / 32) * 16;
        TileRange range = tile.tiles_of<16>(first, tile.first_key / BLOCK_K);
        assign(sum, [](int, int) { return 0.0f; });
        if constexpr (SECOND && !Direction::IN_REGISTERS) sync_warp();  // the row's terms are there
        Ring<VALUES> ring(*this);
#pragma unroll 1
        for (int at = 0; at < tile.key_tiles; ++at) {
            bool sees = at >= range.begin && at < range.end;
            uint32_t keys = ring.next();
            Weights<T> weights;
            if (sees) {
                float s[BLOCK_K / 8][4], t[BLOCK_K / 8][4];
                multiply_rows<T, SECOND>(s, t, row, keys);
                if (range.cuts(at)) mask(s, at);
                softmax.weigh(s, scale_log2);
                if constexpr (SECOND) combine(s, t, center, weight);
                softmax.rescale(sum);
                softmax.add(weights.set(s));
            }
            uint32_t operand = VALUES ? ring.next() : keys;
            if (sees) add_sum<Operands>(sum, weights, operand);
        }
        ring.end();
    }
};
