// Operands in shared memory of the matrix instructions of one warp (mma.sync).
#pragma once
#include <row_group.cuh>

// Where a lane finds its row of four 8 x 8 matrices: a left operand's, 16 rows of a tile's rows and 16 columns from
// `chunk` on; a right one's, 16 keys as columns of the product; the same keys as its rows.
DEVICE uint32_t left_operand(const QueryRows& rows, int chunk) {
    int lane = Rows::lane();
    return shared_address(rows.tile) + QueryRows::offset(rows.first + lane % 16, chunk + lane / 16);
}
template <class T>
DEVICE uint32_t columns_operand(uint32_t tile, int key, int chunk) {
    int lane = Rows::lane();
    return tile + T::offset(key + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2);
}
template <class T>
DEVICE uint32_t rows_operand(uint32_t tile, int key, int chunk) {
    int lane = Rows::lane();
    return tile + T::offset(key + lane % 16, chunk + lane / 16);
}

// Two neighbouring tiles of a sum.
DEVICE void multiply_pair(float (&sum)[4], float (&next)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    multiply_add(sum, a, b[0], b[1]);
    multiply_add(next, a, b[2], b[3]);
}

// s = rows . keys, for the warp's 16 rows.
DEVICE void multiply_by_warp(float (&s)[BLOCK_K / 8][4], const QueryRows& rows, uint32_t keys) {
#pragma unroll
    for (int n = 0; n < BLOCK_K / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = 0;
    }
#pragma unroll
    for (int step = 0; step < BLOCK_D / 16; ++step) {
        uint32_t left[4], right[4];
        int chunk = anew(2 * step);  // addresses of one step at a time
        load_matrices(left, left_operand(rows, chunk));
#pragma unroll
        for (int n = 0; n < BLOCK_K / 16; ++n) {
            load_matrices(right, columns_operand<KeyTile>(keys, 16 * n, chunk));
            multiply_pair(s[2 * n], s[2 * n + 1], left, right);
        }
    }
}
