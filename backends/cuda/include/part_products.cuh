// Products of one warp (mma.sync) that decodes: its 8 queries and their 8 probes are one left operand, so that a
// product with keys gives both scores of a pair to one thread, and weights are a right operand of 8 columns as is.
#pragma once
#include <part_softmax.cuh>
#include <part_tile.cuh>

// Where the matrices of a step of 16 columns are, if those of the first are at `first`: chunks are permuted by an
// exclusive or.
template <class T>
DEVICE uint32_t step_address(uint32_t first, int step) {
    constexpr int STEPS = T::PANEL / 16;
    return (first ^ step % STEPS * 32) + step / STEPS * T::PANEL_BYTES;
}

// Rows lane / 4 of the queries and, as rows lane / 4 + 8, of the probes; zero where there is no such row.
struct RowOperands {
    uint32_t of[BLOCK_D / 16][4];

    DEVICE RowOperands(const PartArguments& g, const PartTile& tile, int row, int lane) {
#pragma unroll
        for (int input = 0; input < 2; ++input) {
            bool exists = input < ROW_INPUTS && row < tile.rows;
            const uint16_t* from = nullptr;
            if (exists) {
                constexpr int LAST = ROW_INPUTS - 1;
                int i = input < ROW_INPUTS ? input : LAST;
                from = g.rows[i] + place_of_row(g, g.row_strides[i], tile.kv, row);
            }
#pragma unroll
            for (int pair = 0; pair < BLOCK_D / 8; ++pair) {
                int left = exists ? HEAD_DIM - (8 * pair + 2 * (lane % 4)) : 0;
                of[pair / 2][input + pair % 2 * 2] = load_pair(from + 8 * pair + 2 * (lane % 4), left);
            }
        }
    }

    DEVICE static uint32_t load_pair(const uint16_t* from, int left) {
        if (ALIGNED && HEAD_DIM % 2 == 0) return left > 0 ? *reinterpret_cast<const uint32_t*>(from) : 0;
        return (left > 0 ? from[0] : 0) | (left > 1 ? uint32_t(from[1]) << 16 : 0);
    }
};

// s = rows . keys: numbers 0 and 1 of tile n are the scores of the query of row lane / 4 with the keys
// 8 n + 2 (lane % 4) + {0, 1}, 2 and 3 those of its probe.
DEVICE void multiply_keys(float (&s)[BLOCK_K / 8][4], const RowOperands& rows, uint32_t keys, int lane) {
#pragma unroll
    for (int n = 0; n < BLOCK_K / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = 0;
    }
    uint32_t first = keys + KeyTile::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int step = 0; step < BLOCK_D / 16; ++step) {
#pragma unroll
        for (int n = 0; n < BLOCK_K / 16; ++n) {
            uint32_t key[4];
            // Rows that are eight apart are permuted alike.
            load_matrices(key, step_address<KeyTile>(first, step) + n * 16 * KeyTile::PANEL * 2);
            multiply_add(s[2 * n], rows.of[step], key[0], key[1]);
            multiply_add(s[2 * n + 1], rows.of[step], key[2], key[3]);
        }
    }
}

// sums += weighted values: of tile m, numbers 2 h + i are column 16 m + 8 h + lane / 4 of row 2 (lane % 4) + i.
DEVICE void add_values(SumTiles& sums, const PartWeights& weights, uint32_t values, int lane) {
    uint32_t first = values + ValueTile::offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int n = 0; n < BLOCK_K / 16; ++n) {
#pragma unroll
        for (int m = 0; m < BLOCK_DV / 16; ++m) {
            uint32_t value[4];
            load_matrices_transposed(value, step_address<ValueTile>(first, m) + n * 16 * ValueTile::PANEL * 2);
#pragma unroll
            for (int i = 0; i < SUMS; ++i) {
#pragma unroll
                for (int term = 0; term < TERMS; ++term) {
                    multiply_add(sums[i][m], value, weights.of[i][term][2 * n], weights.of[i][term][2 * n + 1]);
                }
            }
        }
    }
}

// What a warp has summed, to PART numbers for each of its rows.
DEVICE void store_sums(float* rows, const SumTiles& sums, const PartSoftmax& softmax, int lane) {
#pragma unroll
    for (int sum = 0; sum < SUMS; ++sum) {
#pragma unroll
        for (int m = 0; m < BLOCK_DV / 16; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int row = 2 * (lane % 4) + i % 2, column = 16 * m + i / 2 * 8 + lane / 4;
                rows[row * PART + sum * BLOCK_DV + column] = sums[sum][m][i];
            }
        }
    }
    if (lane % 4) return;
    float* numbers = rows + lane / 4 * PART + NUMBERS_AT;
    numbers[0] = softmax.maximum;
    numbers[1] = softmax.sum;
    if constexpr (HAS_MEAN) numbers[2] = softmax.mean;
}
