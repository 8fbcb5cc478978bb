// A dense system A u = b of BLOCK_D unknowns in the registers of one block: products, and elimination.
#pragma once
#include <ptx.cuh>

constexpr int GRID = 16;              // threads along each side of the matrix
constexpr int SIDE = BLOCK_D / GRID;  // rows and columns of a thread, GRID apart
constexpr int SOLVE_THREADS = GRID * GRID;
constexpr int SOLVE_WARPS = SOLVE_THREADS / 32;
constexpr int PITCH = BLOCK_D + 2;  // of the matrix in shared memory: a warp reads 16 of its rows without conflicts
constexpr int LANES = (BLOCK_D + 31) / 32;

// A vector as every warp holds it: elements lane, lane + 32, ..., zero beyond BLOCK_D.
struct Vector {
    float x[LANES];
};

struct SystemShared {
    float matrix[BLOCK_D * PITCH];  // transposed: the matrix element (i, j) lies at j * PITCH + i
    float image[2][BLOCK_D];
    float operand[SOLVE_WARPS][BLOCK_D];
    float pivot_row[2][BLOCK_D + 1];  // and the right side's element
    float pivot_column[2][BLOCK_D];
};

DEVICE float dot(const Vector& a, const Vector& b) {
    float sum = 0;
#pragma unroll
    for (int c = 0; c < LANES; ++c) sum += a.x[c] * b.x[c];
#pragma unroll
    for (int mask = 16; mask; mask /= 2) sum += from_lane_xor(sum, mask);
    return sum;
}

// All warps hold the same vectors and take the same decisions; the matrix is spread over the threads.
struct System {
    SystemShared& shared;
    int thread, lane, row, column;  // row and column of the thread in the grid
    int turn = 0;
    float matrix[SIDE][SIDE];  // elements (row + GRID a, column + GRID b)

    DEVICE System(SystemShared& shared_, int thread_)
        : shared(shared_), thread(thread_), lane(thread_ % 32), row(thread_ / GRID), column(thread_ % GRID) {}

    // The matrix anew from shared memory, which must be complete.
    DEVICE void load() {
#pragma unroll
        for (int b = 0; b < SIDE; ++b) {
#pragma unroll
            for (int a = 0; a < SIDE; ++a) {
                matrix[a][b] = shared.matrix[(column + GRID * b) * PITCH + row + GRID * a];
            }
        }
    }

    DEVICE Vector vector(const float* from) const {
        Vector v;
#pragma unroll
        for (int c = 0; c < LANES; ++c) v.x[c] = lane + 32 * c < BLOCK_D ? from[lane + 32 * c] : 0;
        return v;
    }

    // Where every thread of the warp can read all of v, until the next call.
    DEVICE const float* spread(const Vector& v) {
        float* to = shared.operand[thread / 32];
        sync_warp();
#pragma unroll
        for (int c = 0; c < LANES; ++c) {
            if (lane + 32 * c < BLOCK_D) to[lane + 32 * c] = v.x[c];
        }
        sync_warp();
        return to;
    }

    // A v.
    DEVICE Vector times(const Vector& v) {
        const float* operand = spread(v);
        float partial[SIDE] = {};
#pragma unroll
        for (int b = 0; b < SIDE; ++b) {
            float x = operand[column + GRID * b];
#pragma unroll
            for (int a = 0; a < SIDE; ++a) partial[a] += matrix[a][b] * x;
        }
        // Over the 16 threads of a row of the grid: each step halves the rows that a thread still sums, then there is
        // one.
        int mask = GRID / 2, mine = 0;
#pragma unroll
        for (int half = SIDE / 2; half; half /= 2, mask /= 2) {
            bool upper = column & mask;
            mine = 2 * mine + upper;
#pragma unroll
            for (int a = 0; a < half; ++a) {
                float kept = upper ? partial[a + half] : partial[a];
                float sent = upper ? partial[a] : partial[a + half];
                partial[a] = kept + from_lane_xor(sent, mask);
            }
        }
        int writers = 2 * mask - 1;
#pragma unroll
        for (; mask; mask /= 2) partial[0] += from_lane_xor(partial[0], mask);
        turn ^= 1;
        if ((column & writers) == 0) shared.image[turn][row + GRID * mine] = partial[0];
        sync_block();
        return vector(shared.image[turn]);
    }

    // Solves by Gauss-Jordan elimination without a search for pivots: the matrix is positive definite but for rounding,
    // and the caller looks at the residual. Destroys the matrix in registers.
    DEVICE Vector eliminate(const Vector& right) {
        const float* spread_right = spread(right);
        float side[SIDE];
#pragma unroll
        for (int a = 0; a < SIDE; ++a) side[a] = spread_right[row + GRID * a];
#pragma unroll
        for (int c = 0; c < SIDE; ++c) {
#pragma unroll 1
            for (int r = 0; r < GRID; ++r) {
                float *pivot_row = shared.pivot_row[r % 2], *pivot_column = shared.pivot_column[r % 2];
                if (column == r) {
#pragma unroll
                    for (int a = 0; a < SIDE; ++a) pivot_column[row + GRID * a] = matrix[a][c];
                }
                if (row == r) {
#pragma unroll
                    for (int b = c; b < SIDE; ++b) pivot_row[column + GRID * b] = matrix[c][b];
                    if (column == 0) pivot_row[BLOCK_D] = side[c];
                }
                sync_block();
                int pivot = r + GRID * c;
                float inverse = 1.0f / pivot_column[pivot];
#pragma unroll
                for (int a = 0; a < SIDE; ++a) {
                    float factor = row + GRID * a == pivot ? 0 : pivot_column[row + GRID * a] * inverse;
#pragma unroll
                    for (int b = c; b < SIDE; ++b) matrix[a][b] -= factor * pivot_row[column + GRID * b];
                    side[a] -= factor * pivot_row[BLOCK_D];
                }
            }
        }
        turn ^= 1;
#pragma unroll
        for (int a = 0; a < SIDE; ++a) {
            if (row == column) shared.image[turn][row + GRID * a] = side[a] / matrix[a][a];
        }
        sync_block();
        return vector(shared.image[turn]);
    }
};
