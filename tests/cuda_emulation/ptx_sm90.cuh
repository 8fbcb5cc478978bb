// Stands in for backends/cuda/include/ptx_sm90.cuh, see ptx.cuh in this folder.
#pragma once
#include <ptx.cuh>

// ---- barriers in shared memory ----

inline void init_barrier(uint64_t* barrier, int arrivals) { block.phases[barrier] = {arrivals, arrivals, 0}; }
inline void arrive(uint64_t* barrier) {
    Phase& phase = block.phases.at(barrier);
    ++block.events;
    if (--phase.missing == 0) {
        phase.missing = phase.arrivals;
        phase.parity ^= 1;
    }
}
inline void wait_phase(uint64_t* barrier, int parity) {
    wait_until([&] { return block.phases.at(barrier).parity != parity; });
}

template <int NAME, int THREADS>
inline void sync_some() {
    ::barrier(NAME, THREADS);
}

template <int REGISTERS>
inline void take_registers() {}
template <int REGISTERS>
inline void give_registers() {}

// ---- matrix products of four warps ----

inline uint64_t describe_operand(uint32_t address, int row_bytes, int panel_bytes) {
    uint64_t mode = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
    return uint64_t(address >> 4 & 0x3fff) | uint64_t(panel_bytes >> 4) << 16 | uint64_t(row_bytes * 8 >> 4) << 32 |
           mode << 62;
}

// Element (k, n) of the operand that a descriptor means, by the swizzled layouts of wgmma's documentation.
inline float described_element(uint64_t descriptor, int k, int n) {
    int mode = descriptor >> 62, chunks = mode == 1 ? 8 : mode == 2 ? 4 : 2;
    uint32_t start = (descriptor & 0x3fff) << 4, panel = (descriptor >> 16 & 0x3fff) << 4;
    uint32_t eight_rows = (descriptor >> 32 & 0x3fff) << 4;
    uint32_t address = start + n / 8 / chunks * panel + n / 8 % chunks * 16 + k / 8 * eight_rows + k % 8 * chunks * 16;
    address ^= (address >> 7 & (chunks - 1)) << 4;
    uint16_t bits;
    std::memcpy(&bits, static_cast<uint8_t*>(at_address(address, 16)) + 2 * (n % 8), 2);
    return to_float(bits);
}

inline void show_to_products() {}
inline void begin_products() {}
inline void hold(uint32_t&) {}
inline void hold(float&) {}

inline void commit_products() {
    with_warp(nullptr, nullptr, 0, [](Lane*) {
        Warp& warp = block.warps[current_thread() / 32];
        warp.committed.push_back(std::move(warp.products));
        warp.products.clear();
    });
}

// Products happen when they are waited for, so that operands which change before show.
template <int PENDING>
inline void wait_product_groups() {
    with_warp(nullptr, nullptr, 0, [](Lane*) {
        auto& groups = block.warps[current_thread() / 32].committed;
        for (; groups.size() > PENDING; groups.erase(groups.begin())) {
            for (auto& product : groups.front()) product();
        }
    });
}
inline void wait_products() { wait_product_groups<0>(); }

template <int TILES>
inline void multiply_group(float (&sum)[TILES][4], const uint32_t (&a)[4], uint64_t b) {
    uint32_t in[6] = {a[0], a[1], a[2], a[3], uint32_t(b), uint32_t(b >> 32)};
    with_warp(&sum[0][0], in, 6, [](Lane* lanes) {
        struct Product {
            float left[16][16];
            float* sums[32];
            uint64_t right;
        } product;
        left_matrix(product.left, lanes);
        product.right = lanes[0].in[4] | uint64_t(lanes[0].in[5]) << 32;
        for (int lane = 0; lane < 32; ++lane) product.sums[lane] = static_cast<float*>(lanes[lane].out);
        block.warps[current_thread() / 32].products.push_back([product] {
            float result[16][8 * TILES] = {};
            for (int k = 0; k < 16; ++k) {
                float right[8 * TILES];
                for (int n = 0; n < 8 * TILES; ++n) right[n] = described_element(product.right, k, n);
                for (int i = 0; i < 16; ++i) {
                    for (int n = 0; n < 8 * TILES; ++n) result[i][n] += product.left[i][k] * right[n];
                }
            }
            for (int lane = 0; lane < 32; ++lane) {
                for (int i = 0; i < 4 * TILES; ++i) {
                    product.sums[lane][i] += result[lane / 4 + i % 4 / 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
                }
            }
        });
    });
}

// ---- products of the rows of two tiles ----

// Element (row, k) of an operand that lies row by row.
inline float described_row_element(uint64_t descriptor, int row, int k) {
    int mode = descriptor >> 62, chunks = mode == 1 ? 8 : mode == 2 ? 4 : 2;
    uint32_t start = (descriptor & 0x3fff) << 4, eight_rows = (descriptor >> 32 & 0x3fff) << 4;
    uint32_t address = start + row / 8 * eight_rows + row % 8 * chunks * 16 + k / 8 * 16;
    address ^= (address >> 7 & (chunks - 1)) << 4;
    uint16_t bits;
    std::memcpy(&bits, static_cast<uint8_t*>(at_address(address, 16)) + 2 * (k % 8), 2);
    return to_float(bits);
}

// Of a warp: left(a) fills its 16 rows, right(n, k) is an element of the other operand.
template <int ADD, int TILES, class Left, class Right>
inline void multiply_described(const Lane* lanes, Left left, Right right) {
    struct Sums {
        float* of[32];
    } held;
    for (int lane = 0; lane < 32; ++lane) held.of[lane] = static_cast<float*>(lanes[lane].out);
    block.warps[current_thread() / 32].products.push_back([=] {
        float a[16][16], b[8 * TILES][16];
        left(a);
        for (int n = 0; n < 8 * TILES; ++n) {
            for (int k = 0; k < 16; ++k) b[n][k] = right(n, k);
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4 * TILES; ++i) {
                int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
                float product = 0;
                for (int k = 0; k < 16; ++k) product += a[row][k] * b[column][k];
                held.of[lane][i] = product + (ADD ? held.of[lane][i] : 0);
            }
        }
    });
}

template <int ADD, int TILES, class Left>
inline void multiply_by_rows(const Lane* lanes, uint64_t right, Left left) {
    multiply_described<ADD, TILES>(lanes, left, [=](int n, int k) { return described_row_element(right, n, k); });
}

template <int ADD, int TILES>
inline void multiply_rows(float (&sum)[TILES][4], const uint32_t (&a)[4], uint64_t b) {
    uint32_t in[6] = {a[0], a[1], a[2], a[3], uint32_t(b), uint32_t(b >> 32)};
    with_warp(&sum[0][0], in, 6, [](Lane* lanes) {
        struct Left {
            float a[16][16];
            void operator()(float (&to)[16][16]) const { std::memcpy(to, a, sizeof a); }
        } left;
        left_matrix(left.a, lanes);
        multiply_by_rows<ADD, TILES>(lanes, lanes[0].in[4] | uint64_t(lanes[0].in[5]) << 32, left);
    });
}

template <int ADD, int TILES>
inline void multiply_shared(float (&sum)[TILES][4], uint64_t a, uint64_t b) {
    uint32_t in[4] = {uint32_t(a), uint32_t(a >> 32), uint32_t(b), uint32_t(b >> 32)};
    with_warp(&sum[0][0], in, 4, [](Lane* lanes) {
        uint64_t a = lanes[0].in[0] | uint64_t(lanes[0].in[1]) << 32;
        int first = current_thread() / 32 % 4 * 16;
        auto left = [=](float (&to)[16][16]) {
            for (int row = 0; row < 16; ++row) {
                for (int k = 0; k < 16; ++k) to[row][k] = described_row_element(a, first + row, k);
            }
        };
        multiply_by_rows<ADD, TILES>(lanes, lanes[0].in[2] | uint64_t(lanes[0].in[3]) << 32, left);
    });
}

// Copies are waited for here already: a missing wait for the barrier still shows.
inline void arrive_when_copied(uint64_t* barrier) {
    finish_copies(fiber(), 1 << 30);
    arrive(barrier);
}

inline void sync_group(int group) { ::barrier(group + 1, 128); }
