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
inline void commit_products() {}
inline void hold(uint32_t&) {}
inline void hold(float&) {}

// Products happen when they are waited for, so that operands which change before show.
inline void wait_products() {
    with_warp(nullptr, nullptr, 0, [](Lane*) {
        Warp& warp = block.warps[current_thread() / 32];
        for (auto& product : warp.products) product();
        warp.products.clear();
    });
}

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
