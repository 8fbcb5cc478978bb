// Stands in for backends/cuda/include/ptx.cuh: the same functions for threads that are fibers of one CPU thread. What
// runs asynchronously on a GPU happens as late as the code allows, and shared memory starts as NaN, so that a missing
// wait shows.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <fibers.h>

#define DEVICE inline
#define KERNEL(threads, blocks) extern "C" void
#define PARAMETER const

constexpr float INFINITE = __builtin_huge_valf();

struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

inline uint8_t* shared_memory() { return block.shared; }
inline uint32_t shared_address(const void* p) { return uint32_t(static_cast<const uint8_t*>(p) - block.shared); }
inline void* at_address(uint32_t address, uint32_t bytes) {
    require(address + bytes <= block.shared_bytes, "an access outside shared memory");
    return block.shared + address;
}

// ---- arithmetic ----

inline float exp2_of(float x) { return std::exp2(x); }
inline float square_root(float x) { return std::sqrt(x); }

#if BFLOAT16
inline float to_float(uint16_t bits) {
    uint32_t word = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
}
inline uint16_t from_float(float x) {
    uint32_t word;
    std::memcpy(&word, &x, 4);
    if (std::isnan(x)) return uint16_t(word >> 16 | 64);
    return uint16_t((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
constexpr uint32_t PAIR_OF_ONES = 0x3f803f80u;
#else
inline float to_float(uint16_t bits) {
    _Float16 x;
    std::memcpy(&x, &bits, 2);
    return x;
}
inline uint16_t from_float(float x) {
    _Float16 half = std::fmin(std::fmax(x, -65504.0f), 65504.0f);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
constexpr uint32_t PAIR_OF_ONES = 0x3c003c00u;
#endif
inline float low_half(uint32_t pair) { return to_float(uint16_t(pair)); }
inline float high_half(uint32_t pair) { return to_float(uint16_t(pair >> 16)); }
inline uint32_t pack(float low, float high) { return uint32_t(from_float(high)) << 16 | from_float(low); }

inline int anew(int x) { return x; }
inline int thread_anew() { return threadIdx.x; }

// ---- threads of a block ----

inline void sync_warp() {
    with_warp(nullptr, nullptr, 0, [](Lane*) {});
}
inline void sync_block() { barrier(0, block.threads); }

inline float from_lane(float x, int lane) {
    uint32_t in[2] = {0, uint32_t(lane)};
    std::memcpy(in, &x, 4);
    with_warp(&x, in, 2, [](Lane* lanes) {
        for (int i = 0; i < 32; ++i) std::memcpy(lanes[i].out, &lanes[lanes[i].in[1] % 32].in[0], 4);
    });
    return x;
}
inline float from_lane_xor(float x, int mask) { return from_lane(x, current_thread() % 32 ^ mask); }
inline int uniform(int x) { return x; }
inline int any_lane(int bits) {
    uint32_t in[1] = {uint32_t(bits)};
    with_warp(&bits, in, 1, [](Lane* lanes) {
        uint32_t any = 0;
        for (int i = 0; i < 32; ++i) any |= lanes[i].in[0];
        for (int i = 0; i < 32; ++i) *static_cast<int*>(lanes[i].out) = any;
    });
    return bits;
}

// ---- copies ----

inline void copy_part_of_16_async(uint32_t to, const void* from, int bytes) {
    require(to % 16 == 0 && (bytes == 0 || uintptr_t(from) % 16 == 0), "an asynchronous copy that is not aligned");
    fiber().copies.push_back({at_address(to, 16), from, bytes, fiber().committed});
}
inline void copy_16_async(uint32_t to, const void* from) { copy_part_of_16_async(to, from, 16); }
inline void copy_16_async(uint32_t to, const void* from, bool read) { copy_part_of_16_async(to, from, read ? 16 : 0); }
inline void commit_copies() { ++fiber().committed; }
template <int PENDING>
inline void wait_copies() {
    finish_copies(fiber(), fiber().committed - PENDING);
}
inline void store_shared_16(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    uint32_t words[4] = {a, b, c, d};
    std::memcpy(at_address(to, 16), words, 16);
}

inline void load_shared_16(uint32_t (&to)[4], uint32_t from) { std::memcpy(to, at_address(from, 16), 16); }

// ---- matrix products of one warp ----

template <bool TRANSPOSED>
inline void load_four(uint32_t (&to)[4], uint32_t address) {
    with_warp(to, &address, 1, [](Lane* lanes) {
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
                uint16_t pair[2];
                for (int j = 0; j < 2; ++j) {
                    int row = lane / 4, column = lane % 4 * 2 + j;
                    if (TRANSPOSED) std::swap(row, column);
                    uint32_t start = lanes[8 * i + row].in[0];
                    require(start % 16 == 0, "a matrix row that is not aligned");
                    std::memcpy(&pair[j], static_cast<uint8_t*>(at_address(start, 16)) + 2 * column, 2);
                }
                std::memcpy(static_cast<uint32_t*>(lanes[lane].out) + i, pair, 4);
            }
        }
    });
}
inline void load_matrices(uint32_t (&to)[4], uint32_t address) { load_four<false>(to, address); }
inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t address) { load_four<true>(to, address); }

// The left operand of a warp, 16 x 16, from the registers of its lanes.
inline void left_matrix(float (&a)[16][16], const Lane* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 4; ++i) {
            int row = lane / 4 + i % 2 * 8, column = lane % 4 * 2 + i / 2 * 8;
            a[row][column] = low_half(lanes[lane].in[i]);
            a[row][column + 1] = high_half(lanes[lane].in[i]);
        }
    }
}

inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    uint32_t in[6] = {a[0], a[1], a[2], a[3], b0, b1};
    with_warp(sum, in, 6, [](Lane* lanes) {
        float left[16][16], right[16][8], product[16][8] = {};
        left_matrix(left, lanes);
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 2; ++i) {
                right[lane % 4 * 2 + 8 * i][lane / 4] = low_half(lanes[lane].in[4 + i]);
                right[lane % 4 * 2 + 8 * i + 1][lane / 4] = high_half(lanes[lane].in[4 + i]);
            }
        }
        for (int i = 0; i < 16; ++i) {
            for (int k = 0; k < 16; ++k) {
                for (int j = 0; j < 8; ++j) product[i][j] += left[i][k] * right[k][j];
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
                static_cast<float*>(lanes[lane].out)[i] += product[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
            }
        }
    });
}
