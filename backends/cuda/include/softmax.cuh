// How scores of a tile become weights: relative to a running maximum, or to what an earlier sweep found.
#pragma once
#include <row_state.cuh>

// A running maximum and sum of the scores.
struct OnlineSoftmax {
    Row maximum = {-INFINITE, -INFINITE};
    Row sum = {0, 0};
    Row factor = {1, 1};  // of what has been summed so far

    template <int TILES>
    DEVICE void weigh(float (&s)[TILES][4], float scale_log2) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float largest = -INFINITE;
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; ++i) {
                    s[n][i] *= scale_log2;
                    largest = fmaxf(largest, s[n][i]);
                }
            }
            largest = fmaxf(maximum[r], maximum_of_row(largest));
            float finite = largest == -INFINITE ? 0 : largest;
            factor[r] = exp2_of(maximum[r] - finite);
            maximum[r] = largest;
            sum[r] *= factor[r];
#pragma unroll
            for (int n = 0; n < TILES; ++n) {
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; ++i) s[n][i] = exp2_of(s[n][i] - finite);
            }
        }
    }

    // The weights as products see them are what is summed: the mean of keys that share an offset keeps that offset.
    DEVICE void add(const Row& sums) { sum[0] += sums[0], sum[1] += sums[1]; }

    template <int WIDTH>
    DEVICE void rescale(Vector<WIDTH>& sums) const {
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums.x[n][i] *= factor[i / 2];
        }
    }

    // Over the threads that share a row.
    DEVICE void end(const Rows& rows) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float total = sum_of_row(sum[r]);
            sum[r] = rows.exists(r) ? total : 0;
        }
    }
};

// p = exp2(score - lse), times 2^WEIGHT_SHIFT so that float16 has it in range.
struct SavedSoftmax {
    Row lse;

    DEVICE explicit SavedSoftmax(const Row& lse) : lse{lse[0] - WEIGHT_SHIFT, lse[1] - WEIGHT_SHIFT} {}

    template <int TILES>
    DEVICE void weigh(float (&s)[TILES][4], float scale_log2) const {
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] = exp2_of(s[n][i] * scale_log2 - lse[i / 2]);
        }
    }

    DEVICE void add(const Row&) const {}

    template <int WIDTH>
    DEVICE void rescale(Vector<WIDTH>&) const {}

    template <int WIDTH>
    DEVICE static void end(Vector<WIDTH>& sums) {
        if constexpr (WEIGHT_SHIFT != 0) {
            assign(sums, [&](int n, int i) { return sums(n, i) * (1.0f / (1 << WEIGHT_SHIFT)); });
        }
    }
};
