// One pass over the keys of a part, with the matrix instructions of four warps (wgmma), for compute capability 9.0.
//
// One group of four warps copies tiles and weighs their keys, two warps a tile. Each of the others owns 64 rows of both
// sums, in registers: it makes the weighted keys of its rows, in the layout of a left operand, and multiplies them with
// the tile in shared memory, and 64 columns of the values with the weights. A warp that starts products waits until the
// tensor cores have taken them. So the groups take turns: while one's are taken, the other makes its next weighted keys.
#include <gram_copy.cuh>
#include <gram_part.cuh>
#include <gram_shares.cuh>
#include <products_sm90.cuh>
#include <ptx_dependent.cuh>
#include <ptx_transposed.cuh>
#include <ptx_turns.cuh>

constexpr int GROUP = 128;
// Beside the block's own; those that follow are for turns.
constexpr int FIRST_PAIR_BARRIER = 1, SECOND_PAIR_BARRIER = 2, ROWS_BARRIER = 3;
constexpr int ROW_GROUPS = BLOCK_D / 64;
constexpr int ROW_WARPS = 4 * ROW_GROUPS;
constexpr int COPY_WARPS = GROUP / 32;
constexpr int WARPS = ROW_WARPS + COPY_WARPS;
constexpr int THREADS = 32 * WARPS;
constexpr int BLOCKS = ROW_GROUPS == 1 ? 2 : 1;  // on a multiprocessor at least, which sets the registers at the start
constexpr int ROW_REGISTERS = ROW_GROUPS == 1 ? 152 : 208;
constexpr int COPY_REGISTERS = ROW_GROUPS == 1 ? 104 : 88;
// A block that takes more than it started with, of which the multiprocessor's 65536 allow so many, waits forever.
constexpr int START_REGISTERS = 65536 / (THREADS * BLOCKS) / 8 * 8;
static_assert(ROW_REGISTERS * ROW_GROUPS + COPY_REGISTERS <= START_REGISTERS * (ROW_GROUPS + 1));
constexpr int STEPS = BLOCK_K / 16;
constexpr int STAGE_BYTES = KeyTile::BYTES + ValueTile::BYTES;
constexpr int NARROW_ROW = 32;  // bytes, the least of an operand
constexpr int VALUE_PANELS = BLOCK_DV / ValueTile::PANEL;
static_assert(ValueTile::PANEL == 64, "a group's columns of the values");

// The weights of a tile as the right operand of products that sum values: a row of each key, whose first two columns
// are its weight and what rounding that lost.
struct NarrowWeights {
    uint32_t rows[BLOCK_K][NARROW_ROW / 4];

    DEVICE void set(int key, float weight) {
        float lost = weight - low_half(pack(weight, 0));
        rows[key][key / 4 % 2 * 4] = pack(weight, lost);  // chunks of 16 bytes are swapped in every other four rows
    }
};

struct Shared {
    uint8_t stages[STAGES][STAGE_BYTES];
    uint8_t ones[16 * NARROW_ROW];  // the right operand of products that sum rows
    NarrowWeights narrow[STAGES];
    uint64_t full[STAGES], empty[STAGES];  // a stage is weighed; nobody needs it any more
    uint64_t met;                          // by all threads of the block
    Part part;
    float weights[STAGES][BLOCK_K];
    int32_t pages[2][BLOCK_K];  // of the tile that each pair starts to copy
    Scratch scratch;

    // All threads, before a pass (parity 0) and after it. The warps that weigh do it elsewhere in the code than those that
    // own rows, which the block's own barrier does not allow.
    DEVICE void meet(int parity) {
        arrive(&met);
        wait_phase(&met, parity);
    }
};

// ---- the warps that copy and weigh ----

// They are two pairs, which take turns with the tiles: while one waits, for its keys or for its own results, the other
// computes.
constexpr int PAIR = 64;
constexpr int ROUND_KEYS = PAIR / 2, KEY_ROUNDS = BLOCK_K / ROUND_KEYS;  // sixteen keys a warp at once
// When a pair has weighed a tile it starts to copy the one that is so many tiles ahead. That has the stage of a tile two
// before the weighed one, or earlier: the last products of it are under way, or nobody needs it any more.
constexpr int LEAD = (STAGES - 2) / 2 * 2;
static_assert(LEAD >= 2);

// The numbers of the thread within its pair, of the pair, and of the warp in the group.
DEVICE int pair_thread() { return thread_anew() % PAIR; }
DEVICE int pair_number() { return thread_anew() / PAIR % 2; }
DEVICE int copy_warp() { return thread_anew() / 32 % COPY_WARPS; }
DEVICE void sync_pair() {
    if (pair_number()) {
        sync_some<SECOND_PAIR_BARRIER, PAIR>();
    } else {
        sync_some<FIRST_PAIR_BARRIER, PAIR>();
    }
}

// What a thread copies. Most tiles are whole: all of their keys are seen.
struct Copies {
    static constexpr bool EVEN = ALIGNED && !PAGE_SIZE && HEAD_DIM == BLOCK_D && HEAD_DIM_V == BLOCK_DV;
    StreamedCopy<KeyTile, PAIR> keys;
    StreamedCopy<ValueTile, PAIR> values;
    const uint16_t *first_key, *first_value;
    int64_t key_stride, value_stride;
    int first, tiles;  // the pair's first tile, and how many there are in all
    int first_whole, whole_stop;
    Turn turn;

    DEVICE Copies(const Part& part, int thread, int first_)
        : keys(thread), values(thread), first(first_), turn{first_, 0} {
        key_stride = part.keys.row_stride, value_stride = part.values.row_stride;
        first_key = part.keys.base + (part.start + keys.key) * key_stride + keys.chunk * CHUNK;
        first_value = part.values.base + (part.start + values.key) * value_stride + values.chunk * CHUNK;
        tiles = part.tiles();
        first_whole = part.start < part.first_seen;
        whole_stop = (part.stop - part.start) / BLOCK_K;
    }

    DEVICE bool is_whole(int tile) const { return tile >= first_whole && tile < whole_stop; }

    // The pages of a tile's rows: the pair's threads read one each, and share them.
    DEVICE static void find_pages(Shared& shared, int tile) {
        Slots slots = shared.part.slots(tile);
        sync_pair();  // nobody reads the last tile's
        for (int row = pair_thread(); row < BLOCK_K; row += PAIR) {
            int page = slots.seen(row) ? slots.table[(slots.first + row) / max(PAGE_SIZE, 1)] : 0;
            shared.pages[pair_number()][row] = page;
        }
        sync_pair();
    }

    // Start to copy a tile of the part, if there is one.
    DEVICE void start(int tile, Shared& shared) {
        if (tile < tiles) {
            if (PAGE_SIZE) find_pages(shared, tile);
            wait_phase(&shared.empty[turn.stage], turn.parity ^ 1);
            uint32_t stage = shared_address(shared.stages[turn.stage]);
            if (EVEN && is_whole(tile)) {
                int64_t row = int64_t(tile) * BLOCK_K;
                keys.start_whole(stage, first_key + row * key_stride, keys.ROWS * key_stride);
                values.start_whole(stage + KeyTile::BYTES, first_value + row * value_stride,
                                   values.ROWS * value_stride);
            } else {
                const Part& part = shared.part;
                const int32_t* pages = shared.pages[pair_number()];
                decltype(keys)(pair_thread()).start(stage, part.keys, part.slots(tile), pages);
                decltype(values)(pair_thread()).start(stage + KeyTile::BYTES, part.values, part.slots(tile), pages);
            }
            turn.next(), turn.next();
        }
        commit_copies();
    }

    // The tiles of a pass over the keys that are on their way before the pair has weighed any. The first one begins alone,
    // before the pass is prepared: beside others it would arrive no sooner than they do.
    DEVICE void begin_first(Shared& shared) { start(first, shared); }
    DEVICE void begin_others(Shared& shared) {
#pragma unroll 1
        for (int n = 2; n < LEAD; n += 2) start(first + n, shared);
    }

    // The pass is over. Of an odd number of tiles, the first one of the next pass is the other pair's.
    DEVICE void end() { first ^= tiles % 2; }
};

// The pair's tiles of the part; the first ones are on their way.
DEVICE void weigh(Copies& copies, Turn& turn, Weights& weights, Shared& shared) {
    const Part& part = shared.part;
    KeyShare keys(shared.scratch.query, pair_thread() / 32 * 16, pair_thread() % 32);
#pragma unroll 1
    for (int tile = copies.first; tile < copies.tiles; tile += 2) {
        wait_copies<LEAD / 2 - 1>();
        sync_pair();  // the tile is there for both warps
        uint32_t stage = shared_address(shared.stages[turn.stage]);
        bool whole = copies.is_whole(tile);
        int thread = pair_thread(), lane = thread % 32;
        // Step by step for all of the warp's keys, so that no step waits for the one before.
        float dots[KEY_ROUNDS][4];
#pragma unroll
        for (int n = 0; n < KEY_ROUNDS; ++n) keys.multiply(dots[n], stage + n * ROUND_KEYS * ROW_BYTES<KeyTile>);
#pragma unroll
        for (int n = 0; n < KEY_ROUNDS; ++n) dots[n][0] = keys.product_of_lane(dots[n], lane);
#pragma unroll
        for (int n = 0; n < KEY_ROUNDS; ++n) {
            int own_key = n * ROUND_KEYS + thread / 32 * 16 + key_of_lane(lane);
            bool seen = whole || part.sees(part.start + tile * BLOCK_K + own_key);
            bool counts = lane % 2 == 0;
            float weight = weights.weigh(dots[n][0], seen, counts);
            if (counts) {
                shared.weights[turn.stage][own_key] = weight;
                shared.narrow[turn.stage].set(own_key, weight);
            }
        }
        show_to_products();
        arrive(&shared.full[turn.stage]);
        turn.next(), turn.next();
        copies.start(tile + LEAD, shared);
    }
    wait_copies<0>();
}

// ---- the warps that own rows ----

struct Sums {
    float keys[BLOCK_D / 8][4];
    float values[BLOCK_DV / 8][4];
    float row[1][4];      // of the weighted keys alone; its columns are the same
    float columns[1][4];  // of the values' columns of the group's number, see NarrowWeights
};

// Weighted keys that are multiplied at once, sixteen rows of them, in COUNT terms: of a tile, or in two terms of one
// step, for which there are registers.
template <int COUNT>
struct Weighted {
    static constexpr int STEPS_AT_ONCE = COUNT == 1 ? STEPS : 1;
    uint32_t x[STEPS_AT_ONCE][COUNT][4];

    // Make the keys from step `first` on.
    DEVICE void make(const Shared& shared, const Turn& turn, int first, const float (&shift)[2], int row, int lane) {
        lane = anew(lane);
        uint32_t tile = shared_address(shared.stages[turn.stage]);
#pragma unroll
        for (int i = 0; i < STEPS_AT_ONCE; ++i) {
            int key = 16 * (first + i);
            FourWeights four(shared.weights[turn.stage] + key, lane);
            weigh_keys(x[i], tile + left_operand<KeyTile>(key, row, lane), four, shift);
        }
    }

    // What makes these registers comes before, what uses them after.
    DEVICE void hold() {
#pragma unroll
        for (int i = 0; i < STEPS_AT_ONCE; ++i) hold_all(x[i]);
    }

    DEVICE void start_products(Sums& sums, Shared& shared, const Turn& turn, int first) {
        constexpr int KEY_ROW = 2 * KeyTile::PANEL, VALUE_ROW = 2 * ValueTile::PANEL;
        uint32_t stage = shared_address(shared.stages[turn.stage]);
        uint64_t keys = describe_operand(stage, KEY_ROW, KeyTile::PANEL_BYTES);
        uint64_t values = describe_operand(stage + KeyTile::BYTES, VALUE_ROW, ValueTile::PANEL_BYTES);
        uint64_t ones = describe_operand(shared_address(shared.ones), NARROW_ROW, 0);
        uint64_t weights = describe_operand(shared_address(&shared.narrow[turn.stage]), NARROW_ROW, 0);
        uint32_t panel = thread_anew() / GROUP % VALUE_PANELS * ValueTile::PANEL_BYTES / 16;
        hold();
        begin_products();
#pragma unroll
        for (int i = 0; i < STEPS_AT_ONCE; ++i) {
            int step = first + i;  // of 16 rows, in units of 16 bytes
#pragma unroll
            for (int term = 0; term < COUNT; ++term) {
                multiply_group(sums.keys, x[i][term], further(keys, step * KEY_ROW));
                multiply_group(sums.values, x[i][term], further(values, step * VALUE_ROW));
                multiply_group(sums.row, x[i][term], ones);
            }
            multiply_transposed(sums.columns, further(values, panel + step * VALUE_ROW),
                                further(weights, step * NARROW_ROW));
        }
        commit_products();
    }

    DEVICE void end_products() {
        wait_products();
        hold();
    }
};

// All tiles of the part. What is multiplied next is made while the products of what came before run.
template <int COUNT>
DEVICE void sum_tiles(Sums& sums, Turn& turn, Shared& shared, const float (&shift)[2], int row, int lane) {
    constexpr int STRIDE = Weighted<COUNT>::STEPS_AT_ONCE;
    int tiles = shared.part.tiles();
    Weighted<COUNT> weighted[2];
    wait_phase(&shared.full[turn.stage], turn.parity);
    weighted[0].make(shared, turn, 0, shift, row, lane);
#pragma unroll 1
    for (int tile = 0; tile < tiles;) {
        // Two tiles, or as many steps of one, so that it is known which registers are whose.
#pragma unroll
        for (int n = 0; n < (STRIDE == STEPS ? 2 : STEPS); ++n) {
            int step = n * STRIDE % STEPS;
            bool last = step + STRIDE == STEPS;  // of the tile
            Weighted<COUNT>&now = weighted[n % 2], &next = weighted[(n + 1) % 2];
            Turn next_turn = last ? turn.following() : turn;
            if (ROW_GROUPS > 1) wait_for_turn(thread_anew() / GROUP);
            now.start_products(sums, shared, turn, step);
            if (ROW_GROUPS > 1) give_turn(1 - thread_anew() / GROUP);
            if (!last || tile + 1 < tiles) {
                if (last) wait_phase(&shared.full[next_turn.stage], next_turn.parity);
                next.make(shared, next_turn, (step + STRIDE) % STEPS, shift, row, lane);
            }
            now.end_products();
            if (last) {
                arrive(&shared.empty[turn.stage]);
                turn = next_turn;
                if (++tile >= tiles) break;
            }
        }
    }
}

DEVICE void store_sums(Sums& sums, float* state) {
    int thread = thread_anew(), row = thread / 32 * 16, lane = thread % 32;
    hold_all(sums.keys), hold_all(sums.values), hold_all(sums.row), hold_all(sums.columns);
    store_rows<BLOCK_D>(state + KEYS_AT, sums.keys, row + lane / 4, lane);
    store_rows<BLOCK_DV>(state + VALUES_AT, sums.values, row + lane / 4, lane);
    if (lane % 4) return;
    state[KEY_SUM_AT + row + lane / 4] = sums.row[0][0];
    state[KEY_SUM_AT + row + lane / 4 + 8] = sums.row[0][2];
    if (row >= BLOCK_DV) return;
    state[VALUE_SUM_AT + row + lane / 4] = sums.columns[0][0] + sums.columns[0][1];
    state[VALUE_SUM_AT + row + lane / 4 + 8] = sums.columns[0][2] + sums.columns[0][3];
}

KERNEL(THREADS, BLOCKS) gram_pass(PARAMETER GramArguments g) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    if (thread < sizeof(shared.ones) / 4) reinterpret_cast<uint32_t*>(shared.ones)[thread] = PAIR_OF_ONES;
    for (int row = thread; row < STAGES * BLOCK_K; row += THREADS) {
        for (uint32_t& columns : shared.narrow[row / BLOCK_K].rows[row % BLOCK_K]) columns = 0;
    }
    if (thread == 0) shared.part = Part(g, blockIdx.x);
    if (thread == THREADS - 1) {
        init_barrier(&shared.met, THREADS);
        for (int stage = 0; stage < STAGES; ++stage) {
            init_barrier(&shared.full[stage], PAIR);
            init_barrier(&shared.empty[stage], 32 * ROW_WARPS);
        }
    }
    let_next_kernel_start();
    sync_block();
    const Part& part = shared.part;
    if (part.empty()) {
        if (thread == 0) part.state[0] = -INFINITE, part.state[1] = 0;
        return;
    }
    Copies copies(part, thread % PAIR, thread / PAIR % 2);
    if (warp >= ROW_WARPS) {
        copies.begin_first(shared);
    } else {
        uint8_t* key_tile = shared.stages[STAGES - 1];  // which nobody copies to yet
        prepare<ROW_WARPS>(g, part, key_tile, shared.scratch, thread, sync_some<ROWS_BARRIER, 32 * ROW_WARPS>);
    }
    shared.meet(0);
    if (warp >= ROW_WARPS) {
        give_registers<COPY_REGISTERS>();
        Turn turn{copies.first, 0};
        for (bool again = true; again;) {
            copies.begin_others(shared);
            Weights weights(shared.scratch);
            weigh(copies, turn, weights, shared);
            copies.end();
            leave(shared.scratch, weights, copy_warp(), thread_anew() % 32);
            shared.meet(1);
            again = too_low<COPY_WARPS>(shared.scratch, weights.reference);
            if (thread_anew() == THREADS - 1) conclude<COPY_WARPS>(shared.scratch, shared.part, weights.reference);
            if (again) {
                shared.meet(0);
                copies.begin_first(shared);
            }
        }
    } else {
        take_registers<ROW_REGISTERS>();
        int row = 16 * warp;
        float shift[2] = {shared.scratch.shift[row + lane / 4], shared.scratch.shift[row + lane / 4 + 8]};
        Turn turn;
        // The first group begins; what the last one gives it after the last tile is there for another pass.
        if (ROW_GROUPS > 1 && warp >= 4) give_turn(0);
        for (bool again = true; again;) {
            Sums sums = {};
            if (part.in_two_terms()) {
                sum_tiles<2>(sums, turn, shared, shift, row, lane);
            } else {
                sum_tiles<1>(sums, turn, shared, shift, row, lane);
            }
            store_sums(sums, part.state);
            float reference = shared.scratch.reference;
            shared.meet(1);
            again = too_low<COPY_WARPS>(shared.scratch, reference);
            if (again) shared.meet(0);
        }
    }
}
