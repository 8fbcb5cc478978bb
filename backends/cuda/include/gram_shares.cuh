// What one thread of four warps does to weigh the keys of a tile, without the matrix units:
// products of other warps fill their queue, and an instruction whose result is needed at once would wait behind them.
#pragma once
#include <gram_part.cuh>

template <class T>
constexpr uint32_t ROW_BYTES = T::PANEL * 2;

// The query as the lanes that share a key have it: of every panel the chunk of the lane's number.
struct QueryChunks {
    static constexpr int COUNT = KeyTile::BLOCK_WIDTH / KeyTile::PANEL, LANES = KeyTile::PANEL_CHUNKS;
    float x[COUNT][CHUNK];

    DEVICE QueryChunks(const uint16_t* query, int lane) {
#pragma unroll
        for (int n = 0; n < COUNT * CHUNK; ++n) {
            x[n / CHUNK][n % CHUNK] = low_half(query[n / CHUNK * KeyTile::PANEL + lane % LANES * CHUNK + n % CHUNK]);
        }
    }

    DEVICE float times(const uint32_t (&key)[COUNT][CHUNK / 2]) const {
        float sums[2] = {};
#pragma unroll
        for (int panel = 0; panel < COUNT; ++panel) {
#pragma unroll
            for (int i = 0; i < CHUNK / 2; ++i) {
                sums[0] += low_half(key[panel][i]) * x[panel][2 * i];
                sums[1] += high_half(key[panel][i]) * x[panel][2 * i + 1];
            }
        }
        return sums[0] + sums[1];
    }
};

// Sixteen keys of a warp, four at a time, eight lanes to each: which of them a lane ends up with, as another one does.
DEVICE int key_of_lane(int lane) { return 8 * (lane / 4 % 2) + 4 * (lane / 2 % 2) + lane / 8; }

// What a lane reads of the sixteen keys from `first` on. Rows that are eight apart are permuted alike.
struct KeyShare {
    QueryChunks query;
    uint32_t offsets[2];

    DEVICE KeyShare(const uint16_t* query_, int first, int lane) : query(query_, lane) {
#pragma unroll
        for (int i = 0; i < 2; ++i) offsets[i] = KeyTile::offset(first + 4 * i + lane / 8, lane % 8);
    }

    // The lane's share of the products with its four keys.
    DEVICE void multiply(float (&dots)[4], uint32_t key_tile) const {
        uint32_t keys[4][QueryChunks::COUNT][CHUNK / 2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int panel = 0; panel < QueryChunks::COUNT; ++panel) {
                load_shared_16(keys[i][panel], key_tile + offsets[i % 2] + i / 2 * 8 * ROW_BYTES<KeyTile> +
                                                   panel * KeyTile::PANEL_BYTES);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) dots[i] = query.times(keys[i]);
    }

    // Of the lane's share of four keys: the product with the key that it ends up with.
    DEVICE float product_of_lane(float (&dots)[4], int lane) const {
        // Each exchange leaves half of the sums, then there is one.
#pragma unroll
        for (int half = 2; half; half /= 2) {
            bool upper = lane & 2 * half;
#pragma unroll
            for (int i = 0; i < half; ++i) {
                float sent = upper ? dots[i] : dots[i + half];
                dots[i] = (upper ? dots[i + half] : dots[i]) + from_lane_xor(sent, 2 * half);
            }
        }
        return dots[0] + from_lane_xor(dots[0], 1);
    }
};
