// Sweeps with saved softmax weights, whichever side they hold, with the matrix instructions of four warps (wgmma), for
// compute capability 9.0.
//
// A block has groups of four warps. Each but the last holds 64 query rows or keys; the last one copies tiles of the other
// side, and the numbers of rows among them, into a ring of stages. A group waits for the products that it has started:
// those of another group run meanwhile. Groups start the scores of a tile one after another, or they would wait for the
// tensor cores together and leave them idle together.
#pragma once
#include <products_sm90.cuh>
#include <ptx_backward.cuh>
#include <stage_ring.cuh>

// Of pairs, spread over threads as a sum of products.
using Pairs = float[BLOCK_K / 8][4];

// Numbers of the row of a pair, for two columns next to each other or for two held rows.
template <int FIRST, int COUNT>
struct alignas(FIRST % 2 == 0 && COUNT % 2 == 0 ? 16 : 8) RowNumbers {
    float of[COUNT][2];

    DEVICE float operator()(int number, int i) const { return of[number][HOLDS_KEYS ? i % 2 : i / 2]; }
};

// Weights of pairs as the left operand of products.
struct Weights {
    uint32_t of[STEPS][4];
};

// Several weights of every pair: `weigh(n, i, to)` writes those of number i of tile n.
template <int COUNT, class F>
DEVICE void set_weights(Weights (&weights)[COUNT], F weigh) {
#pragma unroll
    for (int n = 0; n < BLOCK_K / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            float x[COUNT], y[COUNT];
            weigh(n, i, x);
            weigh(n, i + 1, y);
#pragma unroll
            for (int w = 0; w < COUNT; ++w) weights[w].of[n / 2][n % 2 * 2 + i / 2] = pack_finite(x[w], y[w]);
        }
    }
}

struct Group;

// The tile of the streamed side that a group has before it.
struct Stage {
    const Group& group;
    int number, at;
    bool cut;  // whether some pair is hidden

    template <class S>
    DEVICE uint32_t address() const;
    template <int FIRST, int COUNT>
    DEVICE RowNumbers<FIRST, COUNT> numbers(int n) const;
    DEVICE void hide(Pairs& s) const;
    DEVICE void weigh(Pairs& s) const;
    DEVICE void exponentiate(Pairs& s) const;
};

// 64 query rows or keys of a block.
struct Group {
    const SweepArguments& g;
    Shared& shared;
    const HeldBlock& block;
    HeldRows rows;
    float scale, scale_log2;
    float row_numbers[HOLDS_KEYS ? 1 : NUMBERS][2];
    Turn turn = {};

    DEVICE Group(const SweepArguments& g, Shared& shared)
        : g(g), shared(shared), block(shared.block), rows{shared.block} {
        scale = g.scale_pointer ? *g.scale_pointer : g.scale;
        // A scale of 0 must hide pairs too.
        scale_log2 = scale == 0 ? 1e-30f : scale * LOG2_E;
        if constexpr (!HOLDS_KEYS) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                int64_t first = (block.batch * g.num_heads + block.head) * g.table_rows + block.table_start;
                int64_t row = first + rows.number(r);
#pragma unroll
                for (int k = 0; k < NUMBERS; ++k) {
                    row_numbers[k][r] = rows.exists(r) ? g.table[number_at<NUMBERS>(row, k)] : k ? 0 : INFINITE;
                }
            }
        }
    }

    // Of the group in its block; the compiler knows that all lanes have the same.
    DEVICE static int number() { return uniform(thread_anew() / GROUP); }
    DEVICE uint8_t* operands() const { return shared.held[number()]; }

    // ---- what is held ----

    template <class H>
    DEVICE void load(const uint16_t* base, const int64_t (&strides)[3]) {
        constexpr int CHUNKS = H::BLOCK_WIDTH / CHUNK;
        const uint16_t* from = block.of_head(base, strides);
        int first = block.first + GROUP_ROWS * number();
        uint32_t to = shared_address(operands()) + H::OFFSET;
#pragma unroll 1
        for (int at = threadIdx.x % GROUP; at < GROUP_ROWS * CHUNKS; at += GROUP) {
            int row = at / CHUNKS, chunk = at % CHUNKS, left = H::WIDTH - chunk * CHUNK;
            TileCopy<KeyTile, GROUP>::copy_chunk(to + H::offset(row, chunk), from + (first + row) * strides[2] + chunk * CHUNK,
                                                 first + row < block.held, left < CHUNK ? left > 0 ? left : 0 : CHUNK);
        }
    }
    DEVICE void loaded() {
        commit_copies();
        wait_copies<0>();
        show_to_products();
        sync_group(number());
    }

    // ---- the stream ----

    DEVICE void release() {
        sync_warp();
        if (HOLDS_KEYS || HeldRows::lane() == 0) arrive(&shared.empty[turn.stage]);
        turn.next();
    }
    DEVICE void take_turn() const {
        if constexpr (ROW_GROUPS > 1) wait_for_turn(number());
    }
    DEVICE void end_turn() const {
        if constexpr (ROW_GROUPS > 1) give_turn(number() == ROW_GROUPS - 1 ? 0 : number() + 1);
    }
    // Tiles that this group does not need.
    DEVICE void pass(int tiles) {
#pragma unroll 1
        for (int i = 0; i < tiles; ++i) {
            wait_phase(&shared.full[turn.stage], turn.parity);
            take_turn();
            end_turn();
            release();
        }
    }

    // Do `tile` with every tile that the group sees, of one head after another where several share the held keys.
    template <class F>
    DEVICE void stream(F tile) {
        StreamRange range = block.tiles_of<GROUP_ROWS>(block.first + GROUP_ROWS * number());
        int begin = max(range.begin, 0), end = max(range.end, begin), heads = HOLDS_KEYS ? g.group_size : 1;
        // The first group begins; what the last one gives it after the last tile is left over.
        if (ROW_GROUPS > 1 && number() == ROW_GROUPS - 1) give_turn(0);
#pragma unroll 1
        for (int head = 0; head < heads; ++head) {
            pass(begin);
#pragma unroll 1
            for (int at = begin; at < end; ++at) {
                wait_phase(&shared.full[turn.stage], turn.parity);
                show_to_products();
                tile(Stage{*this, turn.stage, at, range.cuts(at)});
                release();
            }
            pass(block.tiles - end);
        }
    }
};

template <class S>
DEVICE uint32_t Stage::address() const {
    return shared_address(group.shared.stages[0]) + number * STAGE_BYTES + S::OFFSET;
}

// COUNT numbers, from the FIRST on, of the rows of the pairs in tile n.
template <int FIRST, int COUNT>
DEVICE RowNumbers<FIRST, COUNT> Stage::numbers(int n) const {
    RowNumbers<FIRST, COUNT> made;
    if constexpr (HOLDS_KEYS) {
        const float* tile = group.shared.numbers[number];
        const float* from = tile + number_at<NUMBERS>(8 * n + 2 * (HeldRows::lane() % 4), FIRST);
        made = *reinterpret_cast<const RowNumbers<FIRST, COUNT>*>(from);
    } else {
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
#pragma unroll
            for (int r = 0; r < 2; ++r) made.of[k][r] = group.row_numbers[FIRST + k][r];
        }
    }
    return made;
}

// Scores of pairs that do not see each other become what has no weight.
DEVICE void Stage::hide(Pairs& s) const {
    const HeldBlock& block = group.block;
    float hidden = group.scale_log2 > 0 ? -INFINITE : INFINITE;
    int first = (block.first_tile + at) * BLOCK_K + HeldRows::column(0);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int held = group.rows.number(r);
        int stop = block.seen_stop(held) - first, start = block.first_seen(held) - first;
#pragma unroll
        for (int n = 0; n < BLOCK_K / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int streamed = 8 * n + i;
                if (streamed >= stop || HeldBlock::HAS_START && streamed < start) s[n][2 * r + i] = hidden;
            }
        }
    }
}

// Scores become weights p = exp2(scale_log2 s - lse). Once for each case, so that it is done where it stands: behind the
// branch it would wait with the other products.
DEVICE void Stage::weigh(Pairs& s) const {
    if (cut) {
        hide(s);
        exponentiate(s);
    } else {
        exponentiate(s);
    }
}

DEVICE void Stage::exponentiate(Pairs& s) const {
#pragma unroll
    for (int n = 0; n < BLOCK_K / 8; ++n) {
        auto lse = numbers<0, 1>(n);
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = exp2_of(s[n][i] * group.scale_log2 - lse(0, i));
    }
}

// ---- products ----

// Scores start where `seed` says.
template <class F>
DEVICE void seed(Pairs& s, F seed) {
#pragma unroll
    for (int n = 0; n < BLOCK_K / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = seed(n, i);
    }
}

// A held operand of scores, which products find in shared memory, or in registers.
template <class H, bool AT_HAND>
struct HeldOperand {
    uint8_t* tile;  // of the group
    uint32_t registers[AT_HAND ? H::BLOCK_WIDTH / 16 : 1][4];

    DEVICE explicit HeldOperand(const Group& group) : tile(group.operands() + H::OFFSET) {
        if constexpr (AT_HAND) {
            int lane = HeldRows::lane(), row = threadIdx.x % GROUP / 32 * 16 + lane % 16;
#pragma unroll
            for (int step = 0; step < H::BLOCK_WIDTH / 16; ++step) {
                load_matrices(registers[step], shared_address(tile) + H::offset(row, 2 * step + lane / 16));
            }
        }
    }

    // sum = held streamed^T, or with ADD sum += that.
    template <bool ADD, class S>
    DEVICE void multiply(Pairs& sum, const Stage& stage) {
        static_assert(H::BLOCK_WIDTH == S::Tile::BLOCK_WIDTH, "operands of a product are as wide as each other");
        uint64_t a = describe_rows(shared_address(tile)), b = describe_rows(stage.address<S>());
#pragma unroll
        for (int step = 0; step < H::BLOCK_WIDTH / 16; ++step) {
            uint64_t left = further(a, columns_of_step(step, H::PANEL_BYTES));
            uint64_t right = further(b, columns_of_step(step, S::Tile::PANEL_BYTES));
            if constexpr (AT_HAND) {
                if (ADD || step) {
                    multiply_rows<1>(sum, registers[step], right);
                } else {
                    multiply_rows<0>(sum, registers[step], right);
                }
            } else {
                if (ADD || step) {
                    multiply_shared<1>(sum, left, right);
                } else {
                    multiply_shared<0>(sum, left, right);
                }
            }
        }
    }

    // For the next tile, at the end of this one.
    DEVICE void keep(const Stage& stage) const {
        if constexpr (AT_HAND) need_here(registers, stage.number);
    }

    // Number i of tile n.
    DEVICE float operator()(int n, int i) const {
        int lane = HeldRows::lane(), row = threadIdx.x % GROUP / 32 * 16 + lane / 4 + i / 2 * 8;
        uint32_t pair = *reinterpret_cast<const uint32_t*>(tile + H::offset(row, n) + lane % 4 * 4);
        return i % 2 ? high_half(pair) : low_half(pair);
    }
};

// sum += weights streamed.
template <class S, int WIDTH>
DEVICE void add_weighted(Vector<WIDTH>& sum, const Weights& weights, const Stage& stage) {
    constexpr int ROW_BYTES = 128;
    uint64_t b = describe_operand(stage.address<S>(), ROW_BYTES, S::Tile::PANEL_BYTES);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        multiply_group(sum.x, weights.of[step], further(b, step * ROW_BYTES));  // 16 rows, in units of 16 bytes
    }
}

template <int WIDTH>
DEVICE void clear(Vector<WIDTH>& sum) {
    assign(sum, [](int, int) { return 0.0f; });
}

// Weights are 2^WEIGHT_SHIFT times what they stand for, see the table's kernel.
template <int WIDTH>
DEVICE void finish(Vector<WIDTH>& sum) {
    if constexpr (WEIGHT_SHIFT != 0) {
        assign(sum, [&](int n, int i) { return sum(n, i) * (1.0f / (1 << WEIGHT_SHIFT)); });
    }
}
