// Tiles of keys or values in shared memory, and the copies that fill them.
#pragma once
#include <ptx.cuh>

constexpr int CHUNK = 8;  // numbers of 16 bytes

// BLOCK_K rows of a cache, in panels of at most 64 columns. Within a panel the 16-byte chunks of a row are permuted by the
// row, in the way that wgmma's swizzle modes have it: eight rows of a chunk lie in different banks.
template <int WIDTH_, int BLOCK_WIDTH_>
struct Tile {
    static constexpr int WIDTH = WIDTH_;
    static constexpr int BLOCK_WIDTH = BLOCK_WIDTH_;
    static constexpr int PANEL = BLOCK_WIDTH < 64 ? BLOCK_WIDTH : 64;
    static constexpr int PANEL_CHUNKS = PANEL / CHUNK;
    static constexpr int PANEL_BYTES = BLOCK_K * PANEL * 2;
    static constexpr int BYTES = BLOCK_K * BLOCK_WIDTH * 2;

    DEVICE static uint32_t offset(int key, int chunk) {
        int permuted = chunk % PANEL_CHUNKS ^ (key / (8 / PANEL_CHUNKS) & (PANEL_CHUNKS - 1));
        return chunk / PANEL_CHUNKS * PANEL_BYTES + key * (PANEL * 2) + permuted * 16;
    }
};

using KeyTile = Tile<HEAD_DIM, BLOCK_D>;
using ValueTile = Tile<HEAD_DIM_V, BLOCK_DV>;

// Keys or values of one sequence and head.
struct Cache {
    const uint16_t* base;
    const int32_t* table;  // the sequence's pages
    int64_t page_stride, row_stride;

    DEVICE const uint16_t* row(int slot) const {
        if (PAGE_SIZE == 0) return base + slot * row_stride;
        constexpr int SIZE = PAGE_SIZE > 0 ? PAGE_SIZE : 1;
        return base + table[slot / SIZE] * page_stride + slot % SIZE * row_stride;
    }
};

// Start to copy the rows first .. first + BLOCK_K; those outside [start, stop) are not read but zero, and so are the
// columns beyond the width. Called by THREADS threads.
template <class T, int THREADS>
DEVICE void copy_tile(uint32_t tile, const Cache& cache, int first, int start, int stop, int thread) {
    constexpr int CHUNKS = T::BLOCK_WIDTH / CHUNK;
#pragma unroll 2
    for (int at = 0; at < BLOCK_K * CHUNKS; at += THREADS) {
        int key = (at + thread) / CHUNKS, chunk = (at + thread) % CHUNKS;
        if (BLOCK_K * CHUNKS % THREADS && key >= BLOCK_K) break;
        int left = T::WIDTH - chunk * CHUNK;
        bool seen = first + key >= start && first + key < stop && left > 0;
        const uint16_t* from = seen ? cache.row(first + key) + chunk * CHUNK : cache.base;
        uint32_t to = tile + T::offset(key, chunk);
        if (ALIGNED) {
            copy_16_async(to, from, seen ? (left < CHUNK ? left : CHUNK) * 2 : 0);
        } else {
            uint32_t pairs[CHUNK / 2];
#pragma unroll
            for (int i = 0; i < CHUNK / 2; ++i) {
                uint32_t low = seen && 2 * i < left ? from[2 * i] : 0;
                uint32_t high = seen && 2 * i + 1 < left ? from[2 * i + 1] : 0;
                pairs[i] = high << 16 | low;
            }
            store_shared_16(to, pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
}
