// Copies of whole tiles that a few threads start, of keys and values that are read once.
#pragma once
#include <ptx_streamed.cuh>
#include <tile.cuh>

// Where a pass leaves parts, the L2 cache is to drop keys and values first: they would drive out parts that the call
// before left there, which this one writes over, and that would have to be written to memory.
//
// The first `bytes` of 16, the others are zero.
DEVICE void copy_16_once(uint32_t to, const void* from, int bytes) {
    if (LEAVES_PARTS) {
        copy_16_streamed(to, from, bytes);
    } else {
        copy_part_of_16_async(to, from, bytes);
    }
}
DEVICE void copy_16_once(uint32_t to, const void* from) {
    if (LEAVES_PARTS) {
        copy_16_streamed(to, from);
    } else {
        copy_16_async(to, from);
    }
}

// What one of THREADS threads copies of a tile, see TileCopy.
template <class T, int THREADS>
struct StreamedCopy : TileCopy<T, THREADS> {
    using Base = TileCopy<T, THREADS>;
    using Base::chunk, Base::copies, Base::COUNT, Base::key, Base::PAGE, Base::ROWS;
    static_assert(ROWS % 8 == 0 || (ROWS == 4 && T::PANEL_CHUNKS == 8), "how chunks of a thread's rows are permuted");

    DEVICE explicit StreamedCopy(int thread) : Base(thread) {}

    // The thread's i-th row in shared memory. Four rows further the upper and the lower four chunks change places.
    DEVICE uint32_t address(uint32_t tile, int i) const {
        uint32_t first = tile + T::offset(key, chunk);
        return (ROWS % 8 && i % 2 ? first ^ 64 : first) + i * ROWS * (T::PANEL * 2);
    }

    // Start to copy a tile whose keys are all seen, `step / ROWS` numbers apart; `from` is the thread's first chunk.
    DEVICE void start_whole(uint32_t tile, const uint16_t* from, int64_t step) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (copies(i)) copy_16_once(address(tile, i), from);
            from += step;
        }
    }

    // Start to copy any tile; `pages` has the page of every row.
    DEVICE void start(uint32_t tile, const Cache& cache, const Slots& slots, const int32_t* pages) const {
        int width = min(max(T::WIDTH - chunk * CHUNK, 0), CHUNK);
#pragma unroll 2
        for (int i = 0; i < COUNT; ++i) {
            if (!copies(i)) break;
            int row = key + i * ROWS;
            int64_t page = PAGE_SIZE ? pages[row] * cache.page_stride : 0;
            int slot = PAGE_SIZE ? (slots.first + row) % PAGE : slots.first + row;
            const uint16_t* from = cache.base + page + slot * cache.row_stride + chunk * CHUNK;
            if (ALIGNED) {
                copy_16_once(address(tile, i), from, slots.seen(row) ? 2 * width : 0);
            } else {
                Base::copy_chunk(address(tile, i), from, slots.seen(row), width);
            }
        }
    }
};
