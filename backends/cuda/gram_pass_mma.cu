// One pass over the keys of a part, with the matrix instructions of one warp (mma.sync), for compute capability 8.0 on.
//
// Two groups of warps hold the sums, all in registers: one those of keys with keys, the other those of keys with
// values; in each a warp owns WARP_ROWS rows. A warp makes the weighted keys of its rows in registers, in the layout
// of a left operand. The weights of a tile are computed while the one before it is multiplied.
#include <gram_part.cuh>
#include <ptx_dependent.cuh>

constexpr int WARP_ROWS = BLOCK_D < 32 ? 16 : 32;
constexpr int ROW_TILES = WARP_ROWS / 16;
constexpr int ROW_WARPS = BLOCK_D / WARP_ROWS;
constexpr int WARPS = 2 * ROW_WARPS;
constexpr int THREADS = 32 * WARPS;
constexpr int COLUMN_TILES = (BLOCK_D > BLOCK_DV ? BLOCK_D : BLOCK_DV) / 8;
constexpr int VALUE_TILES = (BLOCK_DV / 16 + ROW_WARPS - 1) / ROW_WARPS;  // of sixteen values that a warp sums
constexpr int NARROW_TILES = ROW_TILES > VALUE_TILES ? ROW_TILES : VALUE_TILES;
constexpr int STAGE_BYTES = KeyTile::BYTES + ValueTile::BYTES;

struct Shared {
    uint8_t stages[STAGES][STAGE_BYTES];
    float weights[2][BLOCK_K];
    Scratch scratch;
    Part part;  // here rather than in every thread's registers, which the sums fill
};

// Of one warp: the sums of weighted keys with keys or values, and the narrow ones, of weighted keys or of values alone.
struct Sums {
    float product[ROW_TILES][COLUMN_TILES][4];
    float narrow[NARROW_TILES][4];
};

// Add one tile; IS_KEYS says whether the warp multiplies with the keys or with the values.
template <int COUNT, bool IS_KEYS>
DEVICE void add_tile(Sums& sums, uint32_t stage, const float* weights, const float (&shift)[ROW_TILES][2], int row_warp,
                     int lane) {
    using T = Tile<IS_KEYS ? HEAD_DIM : HEAD_DIM_V, IS_KEYS ? BLOCK_D : BLOCK_DV>;
    uint32_t tile = IS_KEYS ? stage : stage + KeyTile::BYTES;
#pragma unroll 1
    for (int key = 0; key < BLOCK_K; key += 16) {
        lane = anew(lane);
        FourWeights four(weights + key, lane);
        uint32_t terms[ROW_TILES][COUNT][4];
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
            int row = row_warp * WARP_ROWS + 16 * m;
            weigh_keys(terms[m], stage + left_operand<KeyTile>(key, row, lane), four, shift[m]);
        }
#pragma unroll
        for (int n = 0; n < T::BLOCK_WIDTH / 16; ++n) {
            uint32_t b[4];
            load_matrices_transposed(b, tile + right_operands<T>(key, 16 * n, lane));
#pragma unroll
            for (int term = 0; term < COUNT; ++term) {
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) {
                    multiply_add(sums.product[m][2 * n], terms[m][term], b[0], b[1]);
                    multiply_add(sums.product[m][2 * n + 1], terms[m][term], b[2], b[3]);
                }
            }
        }
        if (IS_KEYS) {
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
                for (int term = 0; term < COUNT; ++term) {
                    multiply_add(sums.narrow[m], terms[m][term], PAIR_OF_ONES, PAIR_OF_ONES);
                }
            }
        } else {
            uint32_t columns[2];
            four.as_columns(columns, lane);
#pragma unroll
            for (int m = 0; m < VALUE_TILES; ++m) {
                int row = 16 * (row_warp + m * ROW_WARPS);
                if (row < BLOCK_DV) {
                    uint32_t a[4];
                    load_matrices_transposed(a, tile + left_operand<ValueTile>(key, row, lane));
                    multiply_add(sums.narrow[m], a, columns[0], columns[1]);
                }
            }
        }
    }
}

// All tiles of the part, those of the next STAGES - 1 on their way.
template <int COUNT>
DEVICE void sum_part(Sums& sums, Weights& weights, Shared& shared, const Part& part, const float (&shift)[ROW_TILES][2],
                     int thread) {
    int tiles = part.tiles(), warp = thread / 32, lane = thread % 32;

    auto copy = [&](int tile) {
        if (tile < tiles) {
            uint32_t stage = shared_address(shared.stages[tile % STAGES]);
            copy_stage<THREADS>(stage, part.keys, part.values, part.slots(tile), thread);
        }
        commit_copies();
    };
    auto weigh = [&](int tile) {
        if (tile >= tiles) return;
        uint32_t stage = shared_address(shared.stages[tile % STAGES]);
        for (int first = 16 * warp; first < BLOCK_K; first += 16 * WARPS) {
            float dots[2];
            dot_products(dots, stage, first, shared.scratch.query, lane);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int key = first + lane / 4 + 8 * i;
                bool counts = lane % 4 == 0;
                float weight = weights.weigh(dots[i], part.sees(part.start + tile * BLOCK_K + key), counts);
                if (counts) shared.weights[tile % 2][key] = weight;
            }
        }
    };

    for (int tile = 0; tile < STAGES - 1; ++tile) copy(tile);
    wait_copies<STAGES - 2>();
    sync_block();
    weigh(0);
    for (int tile = 0; tile < tiles; ++tile) {
        wait_copies<STAGES - 3>();  // the next tile is there
        sync_block();               // for all, as are the weights of this one, and nobody reads the previous one
        copy(tile + STAGES - 1);
        weigh(tile + 1);
        uint32_t stage = shared_address(shared.stages[tile % STAGES]);
        if (warp < ROW_WARPS) {
            add_tile<COUNT, true>(sums, stage, shared.weights[tile % 2], shift, warp, lane);
        } else {
            add_tile<COUNT, false>(sums, stage, shared.weights[tile % 2], shift, warp - ROW_WARPS, lane);
        }
    }
    wait_copies<0>();
}

DEVICE void store_sums(const Sums& sums, float* state, int warp, int lane) {
    warp = anew(warp), lane = anew(lane);
    bool is_keys = warp < ROW_WARPS;
    int row_warp = is_keys ? warp : warp - ROW_WARPS;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
        int row = row_warp * WARP_ROWS + 16 * m + lane / 4;
        if (is_keys) {
            store_rows<BLOCK_D>(state + KEYS_AT, sums.product[m], row, lane);
        } else {
            store_rows<BLOCK_DV>(state + VALUES_AT, sums.product[m], row, lane);
        }
    }
    if (lane % 4) return;
#pragma unroll
    for (int m = 0; m < NARROW_TILES; ++m) {
        const float(&narrow)[4] = sums.narrow[m];
        if (is_keys && m < ROW_TILES) {
            float* to = state + KEY_SUM_AT + row_warp * WARP_ROWS + 16 * m + lane / 4;
            to[0] = narrow[0];
            to[8] = narrow[2];
        }
        int row = 16 * (row_warp + m * ROW_WARPS);
        if (!is_keys && m < VALUE_TILES && row < BLOCK_DV) {
            float* to = state + VALUE_SUM_AT + row + lane / 4;
            to[0] = narrow[0] + narrow[1];
            to[8] = narrow[2] + narrow[3];
        }
    }
}

KERNEL(THREADS, 1) gram_pass(PARAMETER GramArguments g) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    let_next_kernel_start();
    if (thread == 0) shared.part = Part(g, blockIdx.x);
    sync_block();
    const Part& part = shared.part;
    if (part.empty()) {
        if (thread == 0) part.state[0] = -INFINITE, part.state[1] = 0;
        return;
    }
    prepare<WARPS>(g, part, shared.stages[0], shared.scratch, thread, sync_block);
    sync_block();
    float shift[ROW_TILES][2];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
        int row = warp % ROW_WARPS * WARP_ROWS + 16 * m + lane / 4;
        shift[m][0] = shared.scratch.shift[row];
        shift[m][1] = shared.scratch.shift[row + 8];
    }
    for (bool again = true; again;) {
        Weights weights(shared.scratch);
        Sums sums = {};
        if (part.in_two_terms()) {
            sum_part<TERMS>(sums, weights, shared, part, shift, thread);
        } else {
            sum_part<1>(sums, weights, shared, part, shift, thread);
        }
        store_sums(sums, part.state, warp, lane);
        leave(shared.scratch, weights, warp, lane);
        sync_block();
        again = too_low<WARPS>(shared.scratch, weights.reference);
        if (thread == 0) conclude<WARPS>(shared.scratch, part, weights.reference);
        if (again) sync_block();
    }
}
