// A dense system A u = b of BLOCK_D unknowns in the registers of one block: products, and elimination.
#pragma once
#include <ptx.cuh>

constexpr int SOLVE_THREADS = 256;
constexpr int SOLVE_WARPS = SOLVE_THREADS / 32;
constexpr int GRID = 16;              // threads along each side of the matrix while it is eliminated
constexpr int SIDE = BLOCK_D / GRID;  // rows and columns of a thread, GRID apart
constexpr int PITCH = BLOCK_D + 2;    // of the matrix in shared memory: a warp reads 16 of its rows without conflicts
constexpr int LANES = (BLOCK_D + 31) / 32;

// What a thread has of a matrix in rows of WIDTH: four columns of every ROWS_APART-th row.
template <int WIDTH>
struct OwnFours {
    static constexpr int QUADS = WIDTH / 4, ROWS_APART = SOLVE_THREADS / QUADS;
    static constexpr int COUNT = (BLOCK_D + ROWS_APART - 1) / ROWS_APART;
    int row, column;

    DEVICE explicit OwnFours(int thread) : row(thread / QUADS), column(thread % QUADS * 4) {}

    DEVICE bool has(int i) const { return BLOCK_D % ROWS_APART == 0 || row + i * ROWS_APART < BLOCK_D; }
    DEVICE int row_of(int i) const { return row + i * ROWS_APART; }
    DEVICE int at(int i) const { return row_of(i) * WIDTH + column; }
};

// A vector as every warp holds it: elements lane, lane + 32, ..., zero beyond BLOCK_D.
struct Vector {
    float x[LANES];
};

struct SystemShared {
    float matrix[BLOCK_D * PITCH];  // transposed: the matrix element (i, j) lies at j * PITCH + i
    float image[2][SOLVE_WARPS][BLOCK_D];  // shares of each warp
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

// All warps hold the same vectors and take the same decisions; the matrix is spread over the threads, transposed and as
// sums in memory are, so that they become it without a detour: fours[n][m] is the element (column + m, row_of(n)).
struct System {
    using Own = OwnFours<BLOCK_D>;
    SystemShared& shared;
    int thread, lane;
    int turn = 0;
    Own own;
    float fours[Own::COUNT][4];

    DEVICE System(SystemShared& shared_, int thread_)
        : shared(shared_), thread(thread_), lane(thread_ % 32), own(thread_) {}

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
        float partial[4] = {};
#pragma unroll
        for (int n = 0; n < Own::COUNT; ++n) {
            if (!own.has(n)) break;
            float x = operand[own.row_of(n)];
#pragma unroll
            for (int m = 0; m < 4; ++m) partial[m] += fours[n][m] * x;
        }
        turn ^= 1;
#pragma unroll
        for (int m = 0; m < 4; ++m) {
#pragma unroll
            for (int mask = Own::QUADS; mask < 32; mask *= 2) partial[m] += from_lane_xor(partial[m], mask);
        }
        if (lane < Own::QUADS) {
            float4* to = reinterpret_cast<float4*>(shared.image[turn][thread / 32] + own.column);
            *to = {partial[0], partial[1], partial[2], partial[3]};
        }
        sync_block();
        Vector image = {};
#pragma unroll
        for (int warp = 0; warp < SOLVE_WARPS; ++warp) {
            Vector share = vector(shared.image[turn][warp]);
#pragma unroll
            for (int c = 0; c < LANES; ++c) image.x[c] += share.x[c];
        }
        return image;
    }

    // Solves by Gauss-Jordan elimination without a search for pivots: the matrix is positive definite but for rounding,
    // and the caller looks at the residual. Threads have other elements for that, so that all have as many left: of the
    // rows and columns that are GRID apart.
    DEVICE Vector eliminate(const Vector& right) {
        float* shared_fours = shared.matrix + own.row * PITCH + own.column;
#pragma unroll
        for (int n = 0; n < Own::COUNT; ++n) {
            if (!own.has(n)) break;
            float2* to = reinterpret_cast<float2*>(shared_fours + n * Own::ROWS_APART * PITCH);
            to[0] = {fours[n][0], fours[n][1]}, to[1] = {fours[n][2], fours[n][3]};
        }
        sync_block();
        Vector solution = eliminate_shared(right);
#pragma unroll
        for (int n = 0; n < Own::COUNT; ++n) {
            if (!own.has(n)) break;
            const float2* from = reinterpret_cast<const float2*>(shared_fours + n * Own::ROWS_APART * PITCH);
            fours[n][0] = from[0].x, fours[n][1] = from[0].y, fours[n][2] = from[1].x, fours[n][3] = from[1].y;
        }
        return solution;
    }

  private:
    DEVICE Vector eliminate_shared(const Vector& right) {
        int row = thread / GRID, column = thread % GRID;
        float matrix[SIDE][SIDE];  // elements (row + GRID a, column + GRID b)
#pragma unroll
        for (int b = 0; b < SIDE; ++b) {
#pragma unroll
            for (int a = 0; a < SIDE; ++a) matrix[a][b] = shared.matrix[(column + GRID * b) * PITCH + row + GRID * a];
        }
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
            if (row == column) shared.image[turn][0][row + GRID * a] = side[a] / matrix[a][a];
        }
        sync_block();
        return vector(shared.image[turn][0]);
    }
};
