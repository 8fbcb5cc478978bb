// Tiles of keys or values in shared memory, and the copies that fill them.
#pragma once
#include <ptx.cuh>

constexpr int CHUNK = 8;  // numbers of 16 bytes

// BLOCK_K rows of a cache, in panels of at most 64 columns. Within a panel the 16-byte chunks of a row are permuted
// by the row, in the way that wgmma's swizzle modes have it: eight rows of a chunk lie in different banks.
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

// Keys or values of one sequence and head; with pages, which page a slot is in is for the caller to know.
struct Cache {
    const uint16_t* base;
    int64_t page_stride, row_stride;
};

// The slots that a tile is copied from: those outside [start, stop) are not read, their rows are zero.
struct Slots {
    int first, start, stop;
    const int32_t* table;  // the sequence's pages

    DEVICE bool seen(int key) const { return first + key >= start && first + key < stop; }
};

// What one of THREADS threads copies of a tile: the chunk `chunk` of every ROWS-th row from `key` on.
template <class T, int THREADS>
struct TileCopy {
    static constexpr int CHUNKS = T::BLOCK_WIDTH / CHUNK;
    static constexpr int ROWS = THREADS / CHUNKS;
    static constexpr int COUNT = (BLOCK_K + ROWS - 1) / ROWS;
    static constexpr int PAGE = PAGE_SIZE > 0 ? PAGE_SIZE : 1;
    int key, chunk;

    DEVICE explicit TileCopy(int thread) : key(thread / CHUNKS), chunk(thread % CHUNKS) {}

    DEVICE bool copies(int i) const { return BLOCK_K % ROWS == 0 || key + i * ROWS < BLOCK_K; }

    // The pages of the rows, read together: one of them takes as long as all.
    DEVICE void find_pages(int (&pages)[COUNT], const Slots& slots) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            int row = key + i * ROWS;
            pages[i] = PAGE_SIZE && copies(i) && slots.seen(row) ? slots.table[(slots.first + row) / PAGE] : 0;
        }
    }

    // Start to copy; columns beyond the width are zero.
    DEVICE void start(uint32_t tile, const Cache& cache, const Slots& slots, const int (&pages)[COUNT]) const {
        int left = T::WIDTH - chunk * CHUNK;
        int width = T::WIDTH == T::BLOCK_WIDTH ? CHUNK : left < CHUNK ? left > 0 ? left : 0 : CHUNK;
        uint32_t to = tile + T::offset(key, chunk);
        int64_t step = ROWS * cache.row_stride;
        const uint16_t* from = cache.base + (slots.first + key) * cache.row_stride + chunk * CHUNK;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (!copies(i)) break;
            int row = key + i * ROWS;
            if (PAGE_SIZE) {
                from = cache.base + pages[i] * cache.page_stride + (slots.first + row) % PAGE * cache.row_stride +
                       chunk * CHUNK;
            }
            // Eight rows further the permutation of the chunks is the same.
            uint32_t address = ROWS % 8 == 0 ? to + i * ROWS * (T::PANEL * 2) : tile + T::offset(row, chunk);
            copy_chunk(address, from, slots.seen(row), width);
            from += step;
        }
    }

    // The same where every row is seen and lies `step / ROWS` numbers behind the one before; `from` is the first chunk.
    DEVICE void start_whole(uint32_t tile, const uint16_t* from, int64_t step) const {
        static_assert(ROWS % 8 == 0, "the chunks of all rows are permuted alike");
        uint32_t to = tile + T::offset(key, chunk);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (copies(i)) copy_16_async(to + i * ROWS * (T::PANEL * 2), from);
            from += step;
        }
    }

    // The first `width` numbers of a chunk, if it is seen, and zeros.
    DEVICE static void copy_chunk(uint32_t to, const uint16_t* from, bool seen, int width) {
        if (ALIGNED) {
            if (T::WIDTH % CHUNK == 0) {
                copy_16_async(to, from, seen && width);
            } else {
                copy_part_of_16_async(to, from, seen ? 2 * width : 0);
            }
            return;
        }
        int count = seen ? width : 0;
        uint32_t pairs[CHUNK / 2];
#pragma unroll
        for (int i = 0; i < CHUNK / 2; ++i) {
            uint32_t low = 2 * i < count ? from[2 * i] : 0;
            uint32_t high = 2 * i + 1 < count ? from[2 * i + 1] : 0;
            pairs[i] = high << 16 | low;
        }
        store_shared_16(to, pairs[0], pairs[1], pairs[2], pairs[3]);
    }
};

// Start to copy the keys of some slots; called by THREADS threads.
template <int THREADS>
DEVICE void copy_keys(uint32_t tile, const Cache& keys, const Slots& slots, int thread) {
    TileCopy<KeyTile, THREADS> copy(thread);
    int pages[copy.COUNT];
    copy.find_pages(pages, slots);
    copy.start(tile, keys, slots, pages);
}

// The same for keys and values, which lie behind the keys.
template <int THREADS>
DEVICE void copy_stage(uint32_t stage, const Cache& keys, const Cache& values, const Slots& slots, int thread) {
    TileCopy<KeyTile, THREADS> copy(thread);
    TileCopy<ValueTile, THREADS> value_copy(thread);
    int pages[copy.COUNT];
    copy.find_pages(pages, slots);
    copy.start(stage, keys, slots, pages);
    if constexpr (BLOCK_D == BLOCK_DV) {
        value_copy.start(stage + KeyTile::BYTES, values, slots, pages);
    } else {
        int value_pages[value_copy.COUNT];
        value_copy.find_pages(value_pages, slots);
        value_copy.start(stage + KeyTile::BYTES, values, slots, value_pages);
    }
}
