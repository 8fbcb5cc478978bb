// The warps that fill a ring of stages.
#pragma once
#include <products_sm90.cuh>
#include <stage_ring.cuh>

struct Copier {
    const SweepArguments& g;
    Shared& shared;
    Turn turn = {};
    bool whole = false;  // whether all rows of the tile are there

    DEVICE const HeldBlock& block() const { return shared.block; }
    DEVICE int heads() const { return HOLDS_KEYS ? g.group_size : 1; }

    // What a thread copies of the head's first tile.
    template <class T>
    DEVICE const uint16_t* first_of(const uint16_t* base, const int64_t (&strides)[3], int head) const {
        TileCopy<typename T::Tile, GROUP> copy(threadIdx.x % GROUP);
        Cache cache = block().streamed_cache(base, strides, head);
        return cache.base + (block().first_tile * BLOCK_K + copy.key) * cache.row_stride + copy.chunk * CHUNK;
    }
    // The table has rows beyond the last query, so that every tile has all its numbers.
    DEVICE const float* first_numbers(int head) const {
        int64_t row = (block().batch * g.num_heads + block().streamed_head + head) * g.table_rows + block().table_start;
        return g.table + (row + block().first_tile * BLOCK_K) * NUMBERS + 4 * (threadIdx.x % GROUP);
    }

    DEVICE void begin(int at) {
        whole = (block().first_tile + at + 1) * BLOCK_K <= block().streamed;
        wait_phase(&shared.empty[turn.stage], turn.parity ^ 1);
    }

    // `from` moves on by a tile.
    template <class T>
    DEVICE void copy(const uint16_t*& from, const uint16_t* base, const int64_t (&strides)[3], int head, int at) {
        using Tile = typename T::Tile;
        TileCopy<Tile, GROUP> copy(threadIdx.x % GROUP);
        uint32_t to = shared_address(shared.stages[turn.stage]) + T::OFFSET;
        if (ALIGNED && Tile::WIDTH == Tile::BLOCK_WIDTH && whole) {
            copy.start_whole(to, from, copy.ROWS * strides[2]);
        } else {
            constexpr int NO_PAGES[copy.COUNT] = {};
            Slots slots = {(block().first_tile + at) * BLOCK_K, 0, block().streamed, nullptr};
            copy.start(to, block().streamed_cache(base, strides, head), slots, NO_PAGES);
        }
        from += BLOCK_K * strides[2];
    }

    DEVICE void copy_numbers(const float*& from) {
        int chunk = threadIdx.x % GROUP;
        if (chunk < NUMBERS_OF_TILE / 4) {
            uint32_t to = shared_address(shared.numbers[turn.stage]) + 16 * chunk;
            if (ALIGNED) {
                copy_16_async(to, from);
            } else {
                const uint32_t* bits = reinterpret_cast<const uint32_t*>(from);
                store_shared_16(to, bits[0], bits[1], bits[2], bits[3]);
            }
        }
        from += NUMBERS_OF_TILE;
    }

    DEVICE void end() {
        if (ALIGNED) {
            arrive_when_copied(&shared.full[turn.stage]);
        } else {
            arrive(&shared.full[turn.stage]);
        }
        turn.next();
    }
};
