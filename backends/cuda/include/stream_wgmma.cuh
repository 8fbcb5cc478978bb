// Streaming keys past query rows with the matrix instructions of four warps (wgmma), for compute capability 9.0.
//
// A block has groups of four warps. Each but the last holds 64 rows; the last one copies tiles of keys and values into a
// ring of stages, as far ahead as the ring is long. Products run on their own: while those of a tile's weights run, the
// scores of the next tile become weights.
#pragma once
#include <products_sm90.cuh>
#include <row_group.cuh>
#include <weights.cuh>

constexpr int THREADS = GROUP * (ROW_GROUPS + 1);
// Of a multiprocessor's 65536 registers, in eights for each thread.
constexpr int COPY_REGISTERS = ROW_GROUPS == 3 ? 32 : 24;
constexpr int ROW_REGISTERS = ROW_GROUPS == 3 ? 160 : BLOCKS == 2 ? 232 : 240;

struct Shared : SharedRows {
    uint64_t full[STAGES], empty[STAGES];
    uint64_t met;  // by all threads of the block

    // The warps that copy do it elsewhere in the code than those that hold rows, which the block's own barrier does not
    // allow.
    DEVICE void meet(int parity) {
        arrive(&met);
        wait_phase(&met, parity);
    }
};

// ---- the warps that copy ----

struct Copier {
    const SweepArguments& g;
    Shared& shared;
    Turn turn = {};
    int parity = 0;
    bool ahead = false;  // the first keys of the next pass are under way

    DEVICE Flags vote() { return ::vote(0, shared, parity); }

    // Copy for one pass. Whichever the next one is, it begins with the first keys: they are copied while rows are
    // updated, but after the last pass.
    template <bool VALUES, bool LAST>
    DEVICE void stream() {
        const QueryTile& tile = shared.tile;
        int64_t kv_head = tile.head / g.group_size;
        Cache keys = tile.cache(g.k, g.k_strides, kv_head, tile.k_start);
        Cache values = tile.cache(g.v, g.v_strides, kv_head, tile.k_start);
#pragma unroll 1
        for (int j = 0; j < tile.key_tiles; ++j) {
            if (j || !ahead) copy<KeyTile>(keys, j);
            if (VALUES) copy<ValueTile>(values, j);
        }
        ahead = !LAST && tile.key_tiles;
        if (ahead) copy<KeyTile>(keys, 0);
    }

    template <class T>
    DEVICE void copy(const Cache& cache, int j) {
        wait_phase(&shared.empty[turn.stage], turn.parity ^ 1);
        TileCopy<T, GROUP> copy(thread_anew() % GROUP);
        constexpr int NO_PAGES[TileCopy<T, GROUP>::COUNT] = {};
        copy.start(shared_address(shared.stages[turn.stage]), cache, shared.tile.slots(j), NO_PAGES);
        if (ALIGNED) {
            arrive_when_copied(&shared.full[turn.stage]);
        } else {
            arrive(&shared.full[turn.stage]);
        }
        turn.next();
    }
};

// ---- the warps that hold rows ----

template <int T>
DEVICE void hold_weights(Weights<T>& weights) {
#pragma unroll
    for (int t = 0; t < T; ++t) hold_all(weights.of[t]);
}

// 64 rows of a block and the sweeps that stream keys past them.
struct Group : RowGroup {
    Shared& shared;
    Turn turn = {};

    DEVICE Group(const SweepArguments& g, Shared& shared) : RowGroup(g, shared), shared(shared) { show_rows(); }

    DEVICE Flags vote(int flags) { return ::vote(flags, shared, parity); }

    // What the group's threads have written to its rows is there for products.
    DEVICE void show_rows() {
        show_to_products();
        sync_group(number());
    }

    // ---- the ring ----

    DEVICE void wait_for(const Turn& of) {
        wait_phase(&shared.full[of.stage], of.parity);
        show_to_products();
    }
    DEVICE void wait_for(const Turn& of, const Turn& another) {
        wait_phase(&shared.full[of.stage], of.parity);
        wait_for(another);
    }
    DEVICE void release(const Turn& of) {
        sync_warp();
        if (Rows::lane() == 0) arrive(&shared.empty[of.stage]);
    }
    // Tiles that this group does not need.
    DEVICE void pass(int stages) {
#pragma unroll 1
        for (int i = 0; i < stages; ++i) {
            wait_phase(&shared.full[turn.stage], turn.parity);
            release(turn);
            turn.next();
        }
    }
    template <bool VALUES>
    DEVICE void pass_stream() {
        pass(tile.key_tiles * (VALUES ? 2 : 1));
    }

    // ---- products ----

    // The compiler has to be told that all lanes are at one stage where votes decide how often the ring turns.
    DEVICE uint32_t stage(const Turn& of) const {
        return shared_address(shared.stages[0]) + (LOOPS ? uniform(of.stage) : of.stage) * STAGE_BYTES;
    }

    // Rows in shared memory with the keys of a stage.
    template <bool ADD>
    DEVICE void start_rows(float (&sum)[BLOCK_K / 8][4], const uint8_t* left, const Turn& of) {
        uint64_t a = describe_rows(shared_address(left)), b = describe_rows(stage(of));
#pragma unroll
        for (int step = 0; step < BLOCK_D / 16; ++step) {
            uint64_t left_step = further(a, columns_of_step(step, QueryRows::PANEL_BYTES));
            uint64_t right_step = further(b, columns_of_step(step, KeyTile::PANEL_BYTES));
            if (ADD || step) {
                multiply_shared<1>(sum, left_step, right_step);
            } else {
                multiply_shared<0>(sum, left_step, right_step);
            }
        }
    }

    // The same with rounded rows, in T terms.
    template <int T>
    DEVICE void start_rounded(float (&sum)[BLOCK_K / 8][4], Direction& row, const Turn& of) {
        if constexpr (Direction::IN_REGISTERS) {
            uint64_t b = describe_rows(stage(of));
#pragma unroll
            for (int step = 0; step < BLOCK_D / 16; ++step) {
                uint64_t right = further(b, columns_of_step(step, KeyTile::PANEL_BYTES));
                if (step) {
                    multiply_rows<1>(sum, row.registers[step], right);
                } else {
                    multiply_rows<0>(sum, row.registers[step], right);
                }
            }
        } else {
            start_rows<false>(sum, row.high.tile, of);
            if (T == 2) start_rows<true>(sum, row.low.tile, of);
        }
    }

    template <class T, int COUNT, int WIDTH>
    DEVICE void start_sum(Vector<WIDTH>& sum, Weights<COUNT>& weights, const Turn& of) {
        constexpr int ROW_BYTES = 2 * T::PANEL;
        uint64_t b = describe_operand(stage(of), ROW_BYTES, T::PANEL_BYTES);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            uint64_t right = further(b, step * ROW_BYTES);  // 16 rows, in units of 16 bytes
#pragma unroll
            for (int term = 0; term < COUNT; ++term) multiply_group(sum.x, weights.of[term][step], right);
        }
    }

    // One pass over the keys:
    //     sum[i] = sum over j of weight(p[i, j], t[i, j], r) times key or value j, where t = row . k_j - center
    // with T terms of what is computed. `softmax` makes p of scores, SECOND says whether there is a row at all.
    template <int T, bool SECOND, bool VALUES, int WIDTH, class Softmax, class F>
    DEVICE void stream(Vector<WIDTH>& sum, Softmax& softmax, Direction* row, const Row& center, F weight) {
        constexpr int EACH = VALUES ? 2 : 1;
        using Operands = StreamedTile<VALUES>;
        // Worked out anew in every pass: between them it would take registers that rows' updates need.
        TileRange range = tile.tiles_of<GROUP_ROWS>(tile.first_row + GROUP_ROWS * number(), tile.first_key / BLOCK_K);
        int begin = max(range.begin, 0), end = max(range.end, begin);
        assign(sum, [](int, int) { return 0.0f; });
        if constexpr (SECOND && !Direction::IN_REGISTERS) show_rows();
        pass(begin * EACH);
        if (begin < end) {
            float s[BLOCK_K / 8][4], t[BLOCK_K / 8][4];
            Weights<T> weights;
            Turn held = turn;
            wait_for(turn);
            begin_products();
            start_rows<false>(s, q.tile, turn);
            if constexpr (SECOND) start_rounded<T>(t, *row, turn);
            commit_products();
            wait_product_groups<0>();
            hold_all(s);
            if constexpr (SECOND) hold_all(t), hold_all(row->registers);
            if (range.cuts(begin)) mask(s, begin);
            softmax.weigh(s, scale_log2);
            if constexpr (SECOND) combine(s, t, center, weight);
            softmax.add(weights.set(s));
            if (VALUES) release(turn), turn.next(), held = turn;
            turn.next();
#pragma unroll 1
            for (int at = begin + 1; at < end; ++at) {
                // `turn` has the keys of tile `at`, `held` the operand of the tile before.
                if constexpr (VALUES) {
                    wait_for(turn, held);
                } else {
                    wait_for(turn);
                }
                hold_all(sum.x);
                hold_weights(weights);
                if constexpr (SECOND) hold_all(row->registers);
                begin_products();
                start_rows<false>(s, q.tile, turn);
                commit_products();
                if constexpr (SECOND) {
                    start_rounded<T>(t, *row, turn);
                    commit_products();
                }
                start_sum<Operands>(sum, weights, held);
                commit_products();
                wait_product_groups<SECOND ? 2 : 1>();
                hold_all(s);
                if (range.cuts(at)) mask(s, at);
                softmax.weigh(s, scale_log2);
                if constexpr (SECOND) {
                    wait_product_groups<1>();
                    hold_all(t);
                    combine(s, t, center, weight);
                }
                if (VALUES) release(turn);
                // Rounded only now: no operand of a product may be made while others run.
                wait_product_groups<0>();
                hold_all(sum.x);
                hold_weights(weights);
                release(held);
                softmax.rescale(sum);
                softmax.add(weights.set(s));
                held = turn;
                if (VALUES) turn.next(), held = turn;
                turn.next();
            }
            if (VALUES) wait_for(held);
            hold_all(sum.x);
            hold_weights(weights);
            begin_products();
            start_sum<Operands>(sum, weights, held);
            commit_products();
            wait_product_groups<0>();
            hold_all(sum.x);
            release(held);
        }
        pass((tile.key_tiles - end) * EACH);
        if constexpr (SECOND && !Direction::IN_REGISTERS) sync_group(number());
    }
};
