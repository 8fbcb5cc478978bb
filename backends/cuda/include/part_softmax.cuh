// How the scores of a warp's keys become weights: p, the softmax of the first, and a function of p and the second,
// which is relative to its mean under p. Every warp has maxima and means of its own, those of some keys before: they
// and the sums so far are moved only where weights relative to them would grow too large, or their second moment, these
// keys' included. So a key that outweighs all before it has its own mean, and no large number is rounded.
//
// A thread has one row, lane / 4: of eight keys numbers 0 and 1 of a tile are the first scores of two, and numbers 2
// and 3 the second ones. Four neighbouring threads share the row. Of the sums a thread has other rows, see
// part_products.cuh.
#pragma once
#include <part_column.cuh>
#include <ptx_weights.cuh>
#include <vector.cuh>

// Weights relative to the maximum that is held are at most 2^SLACK: float16 has to hold them times the second score.
constexpr float SLACK = 5.0f;
// Of the mean of earlier keys from the one that is held: rounding the second weights costs up to an eighth more then.
constexpr float DRIFT = 0.5f;

using SumTiles = float[SUMS][BLOCK_DV / 16][4];

// The weights of a warp's keys as right operands: of eight keys the thread's two, for each of the sums. A second term is
// what rounding to the first has lost: products are few beside the bytes that have to be read.
struct PartWeights {
    uint32_t of[SUMS][TERMS][BLOCK_K / 8];

    DEVICE void set(int sum, int n, float first, float second) {
        of[sum][0][n] = pack(first, second);
        if constexpr (TERMS == 2) {
            of[sum][1][n] = pack(first - low_half(of[sum][0][n]), second - high_half(of[sum][0][n]));
        }
    }
};

// Weights by the maximum and the mean that are held, and their sums over the thread's keys.
struct WeighedKeys {
    float p[BLOCK_K / 8][2], second[BLOCK_K / 8][2];  // `second` is the second score less the mean
    float sum = 0, moment = 0;

    DEVICE WeighedKeys(const float (&s)[BLOCK_K / 8][4], float maximum, float mean) {
#pragma unroll
        for (int n = 0; n < BLOCK_K / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                p[n][i] = exp2_of(s[n][i] - maximum);
                sum += p[n][i];
                second[n][i] = s[n][2 + i] - mean;
                if constexpr (HAS_MEAN) moment += p[n][i] * second[n][i];
            }
        }
    }

    DEVICE PartWeights rounded() const {
        PartWeights weights;
#pragma unroll
        for (int n = 0; n < BLOCK_K / 8; ++n) {
            weights.set(0, n, p[n][0], p[n][1]);
            if constexpr (HAS_MEAN) {
                weights.set(1, n, second_weight(p[n][0], second[n][0]), second_weight(p[n][1], second[n][1]));
            }
        }
        return weights;
    }
};

struct PartSoftmax {
    float maximum = LOWEST, mean = 0;
    // Of p and of p times the second score: shares of the row's, since the last move those of the thread's own keys.
    float sum = 0, moment = 0;

    // The weights of keys by their scores, the first of which are exponents.
    DEVICE PartWeights weigh(const float (&s)[BLOCK_K / 8][4], SumTiles& sums) {
        float largest = LOWEST;
#pragma unroll
        for (int n = 0; n < BLOCK_K / 8; ++n) largest = fmaxf(largest, fmaxf(s[n][0], s[n][1]));
        WeighedKeys keys(s, maximum, mean);
        float drift = HAS_MEAN ? fabsf(moment + keys.moment) - DRIFT * (sum + keys.sum) : 0;
        if (any_lane_says(fmaxf(largest - maximum - SLACK, drift) > 0)) {
            move(s, largest, sums);
            keys = WeighedKeys(s, maximum, mean);
        } else {
            sum += keys.sum, moment += keys.moment;
        }
        return keys.rounded();
    }

    // Over the threads that share a row; the mean is that of all keys from here on.
    DEVICE void end(SumTiles& sums) {
        sum = sum_of_row(sum);
        if constexpr (HAS_MEAN) {
            float moved = sum_of_row(moment) / fmaxf(sum, LEAST_SUM);
            mean += moved;
            rescale(sums, 1, moved);
        }
    }

    // Maximum and mean become those of all keys so far, these among them; what earlier ones have left moves along.
    DEVICE void move(const float (&s)[BLOCK_K / 8][4], float largest, SumTiles& sums) {
        float higher = fmaxf(maximum, maximum_of_row(largest)), shrink = exp2_of(maximum - higher), moved = 0;
        maximum = higher;
        WeighedKeys keys(s, maximum, mean);
        float total = sum_of_row(shrink * sum + keys.sum);
        if constexpr (HAS_MEAN) {
            moved = sum_of_row(shrink * moment + keys.moment) / fmaxf(total, LEAST_SUM);
            mean += moved;
        }
        // The threads of a row have a share each of its weight, and none of its moment, which is 0 now.
        sum = total / 4, moment = 0;
        rescale(sums, shrink, moved);
    }

    // `shrink` and `moved` are those of the thread's row.
    DEVICE static void rescale(SumTiles& sums, float shrink, float moved) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int from = 8 * (lane % 4) + 4 * i;  // row 2 (lane % 4) + i
            float factor = from_lane(shrink, from), by = HAS_MEAN ? from_lane(moved, from) : 0;
#pragma unroll
            for (int m = 0; m < BLOCK_DV / 16; ++m) {
#pragma unroll
                for (int half = 0; half < 4; half += 2) {
                    sums[0][m][half + i] *= factor;
                    if constexpr (HAS_MEAN) {
                        sums[1][m][half + i] = sums[1][m][half + i] * factor - by * sums[0][m][half + i];
                    }
                }
            }
        }
    }
};
