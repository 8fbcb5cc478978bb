// One pass over the keys of a part, with the matrix instructions of four warps (wgmma), for compute capability 9.0.
//
// One group of four warps copies tiles, weighs their keys and sums the values. Each of the others owns 64 rows of both
// sums, in registers: it makes the weighted keys of its rows, in the layout of a left operand, and multiplies them with
// the tile in shared memory. Products run on their own: meanwhile the weighted keys of the next tile are made.
#include <gram_part.cuh>
#include <gram_shares.cuh>
#include <products_sm90.cuh>

constexpr int GROUP = 128;
constexpr int ROW_GROUPS = BLOCK_D / 64;
constexpr int ROW_WARPS = 4 * ROW_GROUPS;
constexpr int WARPS = ROW_WARPS + 4;
constexpr int THREADS = 32 * WARPS;
constexpr int BLOCKS = ROW_GROUPS == 1 ? 2 : 1;  // on a multiprocessor at least, which sets the registers at the start
constexpr int ROW_REGISTERS = ROW_GROUPS == 1 ? 152 : 208;
constexpr int COPY_REGISTERS = ROW_GROUPS == 1 ? 104 : 88;
constexpr int STEPS = BLOCK_K / 16;
constexpr int STAGE_BYTES = KeyTile::BYTES + ValueTile::BYTES;
constexpr int ONES_ROW = 32;  // bytes, the least of an operand
// Tiles that are being copied. The others are: one multiplied, one whose weighted keys are made, one weighed.
constexpr int AHEAD = STAGES - 3;
// Whether what is loaded from a tile is under way while other tiles' copies are started and while weights are made: nobody
// else hides those waits, but addresses of pages leave no registers for it.
constexpr bool EARLY = !PAGE_SIZE;

struct Shared {
    uint8_t stages[STAGES][STAGE_BYTES];
    uint8_t ones[16 * ONES_ROW];  // the right operand of products that sum rows
    uint64_t full[STAGES], empty[STAGES];  // a stage is weighed; nobody needs it any more
    uint64_t met;                          // by all threads of the block
    Part part;
    float weights[STAGES][BLOCK_K];
    float value_sums[4][BLOCK_DV];  // of each warp
    Scratch scratch;

    // The warps that weigh do it elsewhere in the code than those that own rows, which the block's own barrier does not
    // allow.
    DEVICE void meet(int parity) {
        arrive(&met);
        wait_phase(&met, parity);
    }
};

// One arrival for the warp, after all that its threads did before.
DEVICE void arrive_as_warp(uint64_t* barrier, int lane) {
    sync_warp();
    if (lane == 0) arrive(barrier);
}

// ---- the warps that copy and weigh ----

// The number of the thread within the group.
DEVICE int copy_thread() { return thread_anew() % GROUP; }

// What a thread copies. Most tiles are whole: all of their keys are seen.
struct Copies {
    static constexpr bool EVEN = ALIGNED && !PAGE_SIZE && HEAD_DIM == BLOCK_D && HEAD_DIM_V == BLOCK_DV;
    TileCopy<KeyTile, GROUP> keys;
    TileCopy<ValueTile, GROUP> values;
    const uint16_t *first_key, *first_value;
    int64_t key_stride, value_stride;
    int tiles, first_whole, whole_stop;
    Turn turn;

    DEVICE Copies(const Part& part, int thread) : keys(thread), values(thread) {
        key_stride = part.keys.row_stride, value_stride = part.values.row_stride;
        first_key = part.keys.base + (part.start + keys.key) * key_stride + keys.chunk * CHUNK;
        first_value = part.values.base + (part.start + values.key) * value_stride + values.chunk * CHUNK;
        tiles = part.tiles();
        first_whole = part.start < part.first_seen;
        whole_stop = (part.stop - part.start) / BLOCK_K;
    }

    DEVICE bool is_whole(int tile) const { return tile >= first_whole && tile < whole_stop; }

    // Start to copy a tile of the part, if there is one.
    DEVICE void start(int tile, Shared& shared) {
        if (tile < tiles) {
            wait_phase(&shared.empty[turn.stage], turn.parity ^ 1);
            uint32_t stage = shared_address(shared.stages[turn.stage]);
            if (EVEN && is_whole(tile)) {
                int64_t row = int64_t(tile) * BLOCK_K;
                keys.start_whole(stage, first_key + row * key_stride, keys.ROWS * key_stride);
                values.start_whole(stage + KeyTile::BYTES, first_value + row * value_stride,
                                   values.ROWS * value_stride);
            } else {
                const Part& part = shared.part;
                copy_stage<GROUP>(stage, part.keys, part.values, part.slots(tile), copy_thread());
            }
            turn.next();
        }
        commit_copies();
    }

    // The first tiles of a pass over the keys.
    DEVICE void begin(Shared& shared) {
#pragma unroll 1
        for (int tile = 0; tile < AHEAD; ++tile) start(tile, shared);
    }
};

// All tiles of the part; the first ones are on their way.
DEVICE void weigh(Copies& copies, Turn& turn, Weights& weights, Shared& shared) {
    const Part& part = shared.part;
    int thread = copy_thread(), lane = thread % 32, first = thread / 32 * 16;
    int own_key = first + key_of_lane(lane);
    bool counts = lane % 2 == 0;
    KeyShare keys(shared.scratch.query, first, lane);
    ValueShare values(first, lane);
    const float* value_weights = shared.weights[0] + first + lane / ValueShare::LANES;
#pragma unroll 1
    for (int tile = 0; tile < copies.tiles; ++tile) {
        wait_copies<AHEAD - 1>();
        sync_some<1, GROUP>();  // the tile is there for all of the group
        uint32_t stage = shared_address(shared.stages[turn.stage]), value_tile = stage + KeyTile::BYTES;
        KeyShare::Pair first_keys, last_keys;
        bool has_keys = BLOCK_K % 64 == 0 || first < BLOCK_K;
        if (!EARLY) copies.start(tile + AHEAD, shared);
        if (has_keys) keys.fetch<0>(first_keys, stage);
        if (EARLY) copies.start(tile + AHEAD, shared);
        if (has_keys) {
            ValueShare::Half first_values, last_values;
            float dots[4];
            keys.fetch<1>(last_keys, stage);
            dots[0] = keys.query.times(first_keys[0]), dots[1] = keys.query.times(first_keys[1]);
            dots[2] = keys.query.times(last_keys[0]), dots[3] = keys.query.times(last_keys[1]);
            if (EARLY) values.fetch<0>(first_values, value_tile);
            bool seen = copies.is_whole(tile) || part.sees(part.start + tile * BLOCK_K + own_key);
            float weight = weights.weigh(keys.product_of_lane(dots, lane), seen, counts);
            if (counts) shared.weights[turn.stage][own_key] = weight;
            sync_warp();
            if (!EARLY) values.fetch<0>(first_values, value_tile);
            values.fetch<1>(last_values, value_tile);
            const float* from = value_weights + turn.stage * BLOCK_K;
            values.add(from, first_values);
            values.add(from + 8, last_values);
        }
        arrive_as_warp(&shared.full[turn.stage], lane);
        turn.next();
    }
    wait_copies<0>();

    values.store(shared.value_sums[thread / 32], lane);
    sync_some<1, GROUP>();
    const float(&sums)[4][BLOCK_DV] = shared.value_sums;
    for (int d = thread; d < BLOCK_DV; d += GROUP) {
        part.state[VALUE_SUM_AT + d] = sums[0][d] + sums[1][d] + (sums[2][d] + sums[3][d]);
    }
}

// ---- the warps that own rows ----

struct Sums {
    float keys[BLOCK_D / 8][4];
    float values[BLOCK_DV / 8][4];
    float row[1][4];  // of the weighted keys alone; its columns are the same
};

// Wait for the tile and make its weighted keys, sixteen rows of them.
template <int COUNT>
DEVICE void make_weighted(uint32_t (&weighted)[STEPS][COUNT][4], Shared& shared, const Turn& turn, const float (&shift)[2],
                          int row, int lane) {
    lane = anew(lane);
    wait_phase(&shared.full[turn.stage], turn.parity);
    show_to_products();
    uint32_t tile = shared_address(shared.stages[turn.stage]);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        FourWeights four(shared.weights[turn.stage] + 16 * step, lane);
        weigh_keys(weighted[step], tile + left_operand<KeyTile>(16 * step, row, lane), four, shift);
    }
}

// What makes these registers comes before, what uses them after.
template <int COUNT>
DEVICE void hold_weighted(uint32_t (&weighted)[STEPS][COUNT][4]) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) hold_all(weighted[step]);
}

template <int COUNT>
DEVICE void start_products(Sums& sums, uint32_t (&weighted)[STEPS][COUNT][4], Shared& shared, const Turn& turn) {
    constexpr int KEY_ROW = 2 * KeyTile::PANEL, VALUE_ROW = 2 * ValueTile::PANEL;
    uint32_t stage = shared_address(shared.stages[turn.stage]);
    uint64_t keys = describe_operand(stage, KEY_ROW, KeyTile::PANEL_BYTES);
    uint64_t values = describe_operand(stage + KeyTile::BYTES, VALUE_ROW, ValueTile::PANEL_BYTES);
    uint64_t ones = describe_operand(shared_address(shared.ones), ONES_ROW, 0);
    hold_weighted(weighted);
    begin_products();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
        for (int term = 0; term < COUNT; ++term) {
            const uint32_t(&left)[4] = weighted[step][term];
            multiply_group(sums.keys, left, further(keys, step * KEY_ROW));  // 16 rows, in units of 16 bytes
            multiply_group(sums.values, left, further(values, step * VALUE_ROW));
            multiply_group(sums.row, left, ones);
        }
    }
    commit_products();
}

template <int COUNT>
DEVICE void end_products(uint32_t (&weighted)[STEPS][COUNT][4], Shared& shared, const Turn& turn, int lane) {
    wait_products();
    hold_weighted(weighted);
    arrive_as_warp(&shared.empty[turn.stage], lane);
}

// All tiles of the part in one term, each made while the products of the one before run.
DEVICE void sum_in_one_term(Sums& sums, Turn& turn, Shared& shared, const float (&shift)[2], int row, int lane) {
    int tiles = shared.part.tiles();
    uint32_t even[STEPS][1][4], odd[STEPS][1][4];
    make_weighted(even, shared, turn, shift, row, lane);
#pragma unroll 1
    for (int tile = 0;; tile += 2) {
        Turn next = turn;
        next.next();
        start_products(sums, even, shared, turn);
        if (tile + 1 < tiles) make_weighted(odd, shared, next, shift, row, lane);
        end_products(even, shared, turn, lane);
        turn = next;
        if (tile + 1 >= tiles) break;
        next.next();
        start_products(sums, odd, shared, turn);
        if (tile + 2 < tiles) make_weighted(even, shared, next, shift, row, lane);
        end_products(odd, shared, turn, lane);
        turn = next;
        if (tile + 2 >= tiles) break;
    }
}

// The same in two terms, for which there are not registers enough twice.
DEVICE void sum_in_two_terms(Sums& sums, Turn& turn, Shared& shared, const float (&shift)[2], int row, int lane) {
    int tiles = shared.part.tiles();
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        uint32_t weighted[STEPS][2][4];
        if constexpr (BFLOAT16) {
            make_weighted(weighted, shared, turn, shift, row, lane);
        } else {  // what keeps numbers in the range of float16 takes the registers of the shift
            int thread = thread_anew();
            const float* of_row = shared.scratch.shift + thread / 32 * 16 + thread % 32 / 4;
            make_weighted(weighted, shared, turn, {of_row[0], of_row[8]}, row, lane);
        }
        start_products(sums, weighted, shared, turn);
        end_products(weighted, shared, turn, lane);
        turn.next();
    }
}

DEVICE void store_sums(Sums& sums, float* state) {
    int thread = thread_anew(), row = thread / 32 * 16, lane = thread % 32;
    hold_all(sums.keys), hold_all(sums.values), hold_all(sums.row);
    store_rows<BLOCK_D>(state + KEYS_AT, sums.keys, row + lane / 4, lane);
    store_rows<BLOCK_DV>(state + VALUES_AT, sums.values, row + lane / 4, lane);
    if (lane % 4) return;
    state[KEY_SUM_AT + row + lane / 4] = sums.row[0][0];
    state[KEY_SUM_AT + row + lane / 4 + 8] = sums.row[0][2];
}

KERNEL(THREADS, BLOCKS) gram_pass(PARAMETER GramArguments g) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    if (thread < sizeof(shared.ones) / 4) reinterpret_cast<uint32_t*>(shared.ones)[thread] = PAIR_OF_ONES;
    if (thread == 0) {
        shared.part = Part(g, blockIdx.x);
        init_barrier(&shared.met, THREADS);
        for (int stage = 0; stage < STAGES; ++stage) {
            init_barrier(&shared.full[stage], 4);
            init_barrier(&shared.empty[stage], ROW_WARPS);
        }
    }
    sync_block();
    const Part& part = shared.part;
    if (part.empty()) {
        if (thread == 0) part.state[0] = -INFINITE, part.state[1] = 0;
        return;
    }
    Copies copies(part, thread % GROUP);
    if (warp >= ROW_WARPS) copies.begin(shared);
    prepare<WARPS>(g, part, shared.stages[STAGES - 1], shared.scratch, thread);  // a stage that nobody copies to yet
    if (warp >= ROW_WARPS) {
        give_registers<COPY_REGISTERS>();
        Turn turn;
        for (bool again = true; again;) {
            Weights weights(shared.scratch);
            weigh(copies, turn, weights, shared);
            again = finish<WARPS>(weights, shared);
            if (again) copies.begin(shared);
        }
    } else {
        take_registers<ROW_REGISTERS>();
        int row = 16 * warp;
        float shift[2] = {shared.scratch.shift[row + lane / 4], shared.scratch.shift[row + lane / 4 + 8]};
        Turn turn;
        for (bool again = true; again;) {
            Sums sums = {};
            if (part.in_two_terms()) {
                sum_in_two_terms(sums, turn, shared, shift, row, lane);
            } else {
                sum_in_one_term(sums, turn, shared, shift, row, lane);
            }
            store_sums(sums, part.state);
            again = finish<WARPS>(Weights(shared.scratch), shared);
        }
    }
}
