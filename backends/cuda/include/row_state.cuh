// What a block keeps of its query rows, spread over threads as vector.cuh says. All numbers of a vector stay with their
// thread, so that nothing but inner products crosses threads.
#pragma once
#include <query_tile.cuh>
#include <vector.cuh>

// Numbers as left operands of a product: register i of step k has those of row i % 2, tile 2 k + i / 2.
using Operand = uint32_t[4];

// Which rows a warp holds, and where they are in memory: all of it follows from the tile, and takes no registers.
struct Rows {
    const QueryTile& tile;

    DEVICE static int lane() { return threadIdx.x % 32; }
    DEVICE static int column(int n) { return 8 * n + 2 * (lane() % 4); }
    // Within its sequence.
    DEVICE int number(int r) const {
        int thread = thread_anew();
        return tile.first_row + thread / 32 * 16 + thread % 32 / 4 + 8 * r;
    }
    DEVICE bool exists(int r) const { return number(r) < tile.queries; }
    // Where tensors are dense.
    DEVICE int64_t memory_row(int r) const { return tile.memory_row + number(r); }
    DEVICE int64_t dense(int r, int width) const { return memory_row(r) * width; }
};

// A vector that waits in memory while keys are streamed: WIDTH columns, of which LOADED count, row by row.
template <int WIDTH, int LOADED>
struct InMemory {
    float* base;
    const Rows& rows;

    DEVICE void load(Vector<WIDTH>& to) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float* from = base + rows.dense(r, LOADED) + rows.column(0);
            bool exists = rows.exists(r);
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n) {
                int left = LOADED - rows.column(n);
                if (LOADED % 2 == 0) {
                    bool read = exists && (LOADED == WIDTH || left > 0);
                    float2 pair = read ? *reinterpret_cast<const float2*>(from + 8 * n) : float2{0, 0};
                    to.x[n][2 * r] = pair.x, to.x[n][2 * r + 1] = pair.y;
                } else {
                    to.x[n][2 * r] = exists && left > 0 ? from[8 * n] : 0;
                    to.x[n][2 * r + 1] = exists && left > 1 ? from[8 * n + 1] : 0;
                }
            }
        }
    }
    DEVICE void store(const Vector<WIDTH>& from) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float* to = base + rows.dense(r, LOADED) + rows.column(0);
            if (!rows.exists(r)) continue;
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n) {
                int left = LOADED - rows.column(n);
                if (LOADED % 2 == 0) {
                    if (LOADED == WIDTH || left > 0) {
                        *reinterpret_cast<float2*>(to + 8 * n) = {from.x[n][2 * r], from.x[n][2 * r + 1]};
                    }
                } else {
                    if (left > 0) to[8 * n] = from.x[n][2 * r];
                    if (left > 1) to[8 * n + 1] = from.x[n][2 * r + 1];
                }
            }
        }
    }
};

struct alignas(16) Four {
    float x[4];
};

// The same in shared memory, in the order of threads: no bank is asked twice.
template <int WIDTH>
struct Parked {
    static constexpr int BYTES_OF_WARP = WIDTH * 16 * 4;
    uint8_t* base;  // of the warp

    DEVICE Four* at() const { return reinterpret_cast<Four*>(base) + Rows::lane(); }
    DEVICE void load(Vector<WIDTH>& to) const {
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n) {
            Four four = at()[32 * n];
#pragma unroll
            for (int i = 0; i < 4; ++i) to.x[n][i] = four.x[i];
        }
    }
    DEVICE void store(const Vector<WIDTH>& from) const {
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n) {
            at()[32 * n] = {from.x[n][0], from.x[n][1], from.x[n][2], from.x[n][3]};
        }
    }
};

// Where a vector waits: the first PARKED ones in shared memory, the others in memory. One that IS_RESULT is copied to
// memory if it is asked for.
template <int SLOT, bool IS_RESULT>
struct Waiting {
    InMemory<BLOCK_D, HEAD_DIM> memory;
    Parked<BLOCK_D> parked;

    template <class Group>
    DEVICE Waiting(const Group& group, float* base)
        : memory{base, group.rows}, parked{SLOT < PARKED ? group.parked(SLOT) : nullptr} {}

    DEVICE void load(Vector<BLOCK_D>& to) const {
        if constexpr (SLOT < PARKED) {
            parked.load(to);
        } else {
            memory.load(to);
        }
    }
    DEVICE void store(const Vector<BLOCK_D>& from) const {
        if constexpr (SLOT < PARKED) parked.store(from);
        if (SLOT >= PARKED || IS_RESULT && memory.base) memory.store(from);
        sync_warp();
    }
};

// Where numbers of rows wait: the first PARKED_ROWS in shared memory, where threads that share a row have one place; the
// others keep their registers.
template <int SLOT>
struct WaitingRow {
    Row held;
    float* parked;  // of the block

    template <class Group>
    DEVICE explicit WaitingRow(const Group& group) : parked(SLOT < PARKED_ROWS ? group.parked_row(SLOT) : nullptr) {}

    DEVICE float* place() const {
        int thread = thread_anew();
        return parked + thread / 32 * 16 + thread % 32 / 4;
    }
    DEVICE void load(Row& to) const {
        if constexpr (SLOT < PARKED_ROWS) {
            const float* from = place();
            to = {from[0], from[8]};
        } else {
            to = held;
        }
    }
    DEVICE void store(const Row& from) {
        if constexpr (SLOT < PARKED_ROWS) {
            sync_warp();  // all have read what was there
            float* to = place();
            if (Rows::lane() % 4 == 0) to[0] = from[0], to[8] = from[1];
            sync_warp();
        } else {
            held = from;
        }
    }
};

// A tile of this warp's 16 rows within rows that lie as tiles do: `tile` is where the first of `GROUP_ROWS` rows is.
struct RowTile {
    static constexpr int PANEL = BLOCK_D < 64 ? BLOCK_D : 64;
    static constexpr int PANEL_CHUNKS = PANEL / CHUNK;
    static constexpr int PANEL_BYTES = GROUP_ROWS * PANEL * 2;
    static constexpr int BYTES = GROUP_ROWS * BLOCK_D * 2;

    DEVICE static uint32_t offset(int row, int chunk) {
        int permuted = chunk % PANEL_CHUNKS ^ (row / (8 / PANEL_CHUNKS) & (PANEL_CHUNKS - 1));
        return chunk / PANEL_CHUNKS * PANEL_BYTES + row * (PANEL * 2) + permuted * 16;
    }

    uint8_t* tile;
    int first;  // of the warp's rows

    // Numbers i and i + 1 of tile n, i even.
    DEVICE uint32_t* pair(int n, int i) const {
        int lane = Rows::lane();
        return reinterpret_cast<uint32_t*>(tile + offset(first + lane / 4 + i / 2 * 8, n) + lane % 4 * 4);
    }
    DEVICE float operator()(int n, int i) const {
        uint32_t two = *pair(n, i);
        return i % 2 ? high_half(two) : low_half(two);
    }
};

// A vector as tile products take it: the nearest sum of TERMS numbers of the input type. One term is in registers; of two
// there would be too many, and products find them in shared memory.
struct Rounded {
    static constexpr bool IN_REGISTERS = TERMS == 1;
    Operand registers[IN_REGISTERS ? BLOCK_D / 16 : 1];
    RowTile high, low;

    // Numbers i and i + 1 of tile n, i even, of the first term.
    DEVICE uint32_t pair(int n, int i) const {
        if constexpr (IN_REGISTERS) {
            uint32_t two = registers[n / 2][n % 2 * 2 + i / 2];
#if __CUDA_ARCH__ >= 1000
            // Unpacked anew at every use: compilers for 10.0 on would keep all numbers beside the terms, and spill them.
            asm volatile("" : "+r"(two));
#endif
            return two;
        }
        return *high.pair(n, i);
    }

    template <int T>
    DEVICE float value(int n, int i) const {
        uint32_t two = pair(n, i / 2 * 2);
        float first = i % 2 ? high_half(two) : low_half(two);
        return T == 2 ? first + low(n, i) : first;
    }

    template <int T, class F>
    DEVICE void assign(F f) {
#pragma unroll
        for (int n = 0; n < BLOCK_D / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                float x = f(n, i), y = f(n, i + 1);
                uint32_t two = pack(x, y);
                if constexpr (IN_REGISTERS) {
                    registers[n / 2][n % 2 * 2 + i / 2] = two;
                } else {
                    *high.pair(n, i) = two;
                }
                if (T == 2) *low.pair(n, i) = pack(x - low_half(two), y - high_half(two));
            }
        }
    }

    // In T terms that lie `distance` apart, rows of HEAD_DIM numbers.
    template <int T>
    DEVICE void store(uint16_t* to, int64_t distance, const Rows& rows) const {
        if (!to) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (!rows.exists(r)) continue;
            uint16_t* start = to + rows.dense(r, HEAD_DIM) + rows.column(0);
#pragma unroll
            for (int n = 0; n < BLOCK_D / 8; ++n) {
                store_pair(start + 8 * n, pair(n, 2 * r), HEAD_DIM - rows.column(n));
                if (T == 2) store_pair(start + distance + 8 * n, *low.pair(n, 2 * r), HEAD_DIM - rows.column(n));
            }
        }
    }

    // The same way back.
    template <int T>
    DEVICE void load(const uint16_t* from, int64_t distance, const Rows& rows) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint16_t* start = from + rows.dense(r, HEAD_DIM) + rows.column(0);
            bool exists = rows.exists(r);
#pragma unroll
            for (int n = 0; n < BLOCK_D / 8; ++n) {
                int left = exists ? HEAD_DIM - rows.column(n) : 0;
                uint32_t two = load_pair(start + 8 * n, left);
                if constexpr (IN_REGISTERS) {
                    registers[n / 2][n % 2 * 2 + r] = two;
                } else {
                    *high.pair(n, 2 * r) = two;
                }
                if (T == 2) *low.pair(n, 2 * r) = load_pair(start + distance + 8 * n, left);
            }
        }
    }

    DEVICE static uint32_t load_pair(const uint16_t* from, int left) {
        if (HEAD_DIM % 2 == 0) return left > 0 ? *reinterpret_cast<const uint32_t*>(from) : 0;
        return (left > 0 ? from[0] : 0) | (left > 1 ? uint32_t(from[1]) << 16 : 0);
    }
    DEVICE static void store_pair(uint16_t* to, uint32_t pair, int left) {
        if (HEAD_DIM % 2 == 0) {
            if (left > 0) *reinterpret_cast<uint32_t*>(to) = pair;
        } else {
            if (left > 0) to[0] = uint16_t(pair);
            if (left > 1) to[1] = uint16_t(pair >> 16);
        }
    }
};

// A vector of which COLUMNS columns count, row by row, if there is a place for it.
template <int COLUMNS, int WIDTH>
DEVICE void store_state(float* to, const Vector<WIDTH>& value, const Rows& rows) {
    if (to) InMemory<WIDTH, COLUMNS>{to, rows}.store(value);
}
