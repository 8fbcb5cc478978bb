// Copies of the BLOCK_K keys and values that a warp takes of a tile. Rows that lie one behind another are found once.
#pragma once
#include <tile.cuh>

// Rows of one page, or all where there are no pages; pages of other sizes are looked up for every row.
constexpr int RUN = PAGE_SIZE == 0 || PAGE_SIZE % BLOCK_K == 0 ? BLOCK_K : PAGE_SIZE % 16 == 0 ? 16 : 1;
constexpr int RUNS = BLOCK_K / RUN;

// What one of THREADS threads copies: the chunk `chunk` of every ROWS-th row from `key` on.
template <class T, int THREADS>
struct RunCopy {
    static constexpr int CHUNKS = T::BLOCK_WIDTH / CHUNK, ROWS = THREADS / CHUNKS;
    static constexpr int COUNT = (BLOCK_K + ROWS - 1) / ROWS;
    // A step of ROWS rows stays in its run, whichever the thread's first row is.
    static constexpr bool BY_RUNS = RUNS == 1 || RUN % ROWS == 0;
    static constexpr int PAGE = PAGE_SIZE > 0 ? PAGE_SIZE : 1;

    Cache cache;
    const uint16_t* base;  // the thread's first row and chunk, were the first slot the first of the cache
    uint32_t to;           // the same within a tile
    int key, width;        // `width` numbers of the chunk are to be read

    DEVICE RunCopy(const Cache& cache, int thread) : cache(cache), key(thread / CHUNKS) {
        int chunk = thread % CHUNKS, left = T::WIDTH - chunk * CHUNK;
        base = cache.base + key * cache.row_stride + chunk * CHUNK;
        to = T::offset(key, chunk);
        width = T::WIDTH == T::BLOCK_WIDTH ? CHUNK : left < CHUNK ? left > 0 ? left : 0 : CHUNK;
    }

    // Rows that are eight apart are permuted alike, and others by an exclusive or with what they are apart.
    DEVICE static uint32_t address(uint32_t first, int i) {
        return (first ^ i * ROWS % 8 * 16) + i * ROWS * (T::PANEL * 2);
    }

    // Start to copy; WHOLE says that all slots are seen.
    template <bool WHOLE>
    DEVICE void start(uint32_t tile, const Slots& slots, const int (&pages)[RUNS]) const {
        const uint16_t* from = nullptr;
        int64_t step = ROWS * cache.row_stride;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (i * ROWS % RUN == 0) {
                int run = i * ROWS / RUN, slot = slots.first + run * RUN;
                from = base + (PAGE_SIZE ? pages[run] * cache.page_stride + slot % PAGE * cache.row_stride
                                         : slot * cache.row_stride);
            }
            int row = key + i * ROWS;
            if (BLOCK_K % ROWS == 0 || row < BLOCK_K) {
                TileCopy<T, THREADS>::copy_chunk(address(tile + to, i), from, WHOLE || slots.seen(row), width);
            }
            from += step;
        }
    }
};

// Of keys, and of values, which lie behind the keys in a stage. The pages of a tile are read while the one before it is
// copied.
template <int THREADS>
struct PartCopy {
    static constexpr bool BY_RUNS = RunCopy<KeyTile, THREADS>::BY_RUNS && RunCopy<ValueTile, THREADS>::BY_RUNS;
    RunCopy<KeyTile, THREADS> keys;
    RunCopy<ValueTile, THREADS> values;
    int pages[RUNS] = {};

    DEVICE PartCopy(const Cache& keys, const Cache& values, int thread) : keys(keys, thread), values(values, thread) {}

    // Called before the same slots are copied.
    DEVICE void find_pages(const Slots& slots) {
        if (!PAGE_SIZE || !BY_RUNS) return;
#pragma unroll
        for (int run = 0; run < RUNS; ++run) {
            int slot = slots.first + run * RUN;
            bool seen = slot + RUN > slots.start && slot < slots.stop;
            pages[run] = seen ? slots.table[slot / RunCopy<KeyTile, THREADS>::PAGE] : 0;
        }
    }

    DEVICE void start(uint32_t stage, const Slots& slots, int thread) const {
        if constexpr (!BY_RUNS) {
            copy_stage<THREADS>(stage, keys.cache, values.cache, slots, thread);
        } else if (slots.first >= slots.start && slots.first + BLOCK_K <= slots.stop) {
            keys.template start<true>(stage, slots, pages);
            values.template start<true>(stage + KeyTile::BYTES, slots, pages);
        } else {
            keys.template start<false>(stage, slots, pages);
            values.template start<false>(stage + KeyTile::BYTES, slots, pages);
        }
    }
};
