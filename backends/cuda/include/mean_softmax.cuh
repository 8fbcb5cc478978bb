// How two scores of a tile become two weights: p, the softmax of the first, and a function of p and the second, which is
// relative to its mean under p. Maximum and mean are those of some tile before, see mean_lowering.py: the sums so far are
// moved along only when weights relative to them grow too large, or their second moment.
#pragma once
#include <ptx_weights.cuh>
#include <row_state.cuh>
#include <weights.cuh>

// Weights relative to the maximum that is held are at most 2^SLACK, and may all be 1: float16 has to hold them times the
// second score, and a tile that outweighs all before it is to have its own mean.
constexpr float SLACK = 5.0f, MOST = 32.0f;
static_assert(BLOCK_K / 4 <= MOST);
// Of the mean of earlier tiles from the one that is held: rounding the second weights costs up to an eighth more then.
constexpr float DRIFT = 0.5f;
// Less than any score: a maximum that nothing is less than, and that -inf less it is -inf.
constexpr float LOWEST = -1e30f;
constexpr float LEAST_SUM = 1e-30f;  // of a row without keys, to divide by

struct MeanSoftmax {
    // Scores times `factor` are exponents; those of a scale that is not positive have been multiplied already, so that
    // the largest score is the largest exponent.
    float scale_log2, factor;
    Row maximum = {LOWEST, LOWEST};
    Row mean = {0, 0};
    // Of p and of p times the second score: shares of the rows' sums, since the last move over the thread's own columns.
    Row sum = {0, 0}, moment = {0, 0};
    // Whether the warp's maxima and means move with this tile, and then what all sums so far lose by that.
    bool moves = false;
    Row shrink = {1, 1};

    DEVICE explicit MeanSoftmax(float scale_log2) : scale_log2(scale_log2), factor(scale_log2 > 0 ? scale_log2 : 1) {}

    // To be called before scores are masked: -inf times 0 is none.
    template <int TILES>
    DEVICE void scale(float (&s)[TILES][4]) const {
        if (scale_log2 > 0) return;
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] *= scale_log2;
        }
    }

    // Scores become p by the maximum that is held, and the sums of p tell whether it has been outgrown: it `moves`, and p
    // has to be made anew. Nobody looks for a maximum before.
    template <int TILES>
    DEVICE void weigh(float (&s)[TILES][4]) {
        Row tile_sum = exponentials(s);
        moves = any_lane_says(fmaxf(fmaxf(tile_sum[0], tile_sum[1]) - MOST, drift()) > 0);
        if (!moves) add(tile_sum);
    }
    template <int TILES>
    DEVICE void weigh_anew(float (&s)[TILES][4]) {
        raise(largest_of(s));
        add(exponentials(s));
    }
    // The same in one step, where scores are not to be had twice.
    template <int TILES>
    DEVICE void weigh_once(float (&s)[TILES][4]) {
        Row largest = largest_of(s);
        float growth = fmaxf(largest[0] * factor - maximum[0], largest[1] * factor - maximum[1]);
        moves = any_lane_says(fmaxf(growth - SLACK, drift()) > 0);
        if (moves) raise(largest);
        add(exponentials(s));
    }

    // What earlier tiles have left becomes relative to the maximum as it is now, and to the mean of all keys so far, those
    // of this tile among them.
    template <int TILES, int WIDTH>
    DEVICE void move(const float (&p)[TILES][4], const float (&a)[TILES][4], Vector<WIDTH>& sums, Vector<WIDTH>& moments) {
        Row tile_sum = {0, 0}, tile_moment = {0, 0}, moved;
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                tile_sum[i / 2] += p[n][i];
                tile_moment[i / 2] += p[n][i] * (a[n][i] - mean[i / 2]);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float total = sum_of_row(sum[r]);
            moved[r] = sum_of_row(moment[r] + tile_moment[r]) / fmaxf(total, LEAST_SUM);
            mean[r] += moved[r];
            // The threads of a row have a share each of its weight, and nothing of its moment, which is 0 with this tile.
            moment[r] = moved[r] * tile_sum[r] - tile_moment[r];
            sum[r] = total / 4;
        }
        assign(sums, [&](int n, int i) { return sums(n, i) * shrink[i / 2]; });
        assign(moments, [&](int n, int i) { return moments(n, i) * shrink[i / 2] - moved[i / 2] * sums(n, i); });
    }

    // The second score becomes the second weight.
    template <int TILES, class F>
    DEVICE void combine(const float (&p)[TILES][4], float (&a)[TILES][4], F weight) {
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float relative = a[n][i] - mean[i / 2];
                a[n][i] = weight(p[n][i], relative);
                moment[i / 2] += p[n][i] * relative;
            }
        }
    }

    // Over the threads that share a row; the mean is that of all keys from here on.
    template <int WIDTH>
    DEVICE void end(const Rows& rows, const Vector<WIDTH>& sums, Vector<WIDTH>& moments) {
        Row moved;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float total = sum_of_row(sum[r]);
            moved[r] = sum_of_row(moment[r]) / fmaxf(total, LEAST_SUM);
            mean[r] += moved[r];
            sum[r] = rows.exists(r) ? total : 0;
        }
        assign(moments, [&](int n, int i) { return moments(n, i) - moved[i / 2] * sums(n, i); });
    }

    // Positive if the mean of earlier tiles has gone too far: a number, and no condition, so that it costs no jump.
    DEVICE float drift() const {
        return fmaxf(fabsf(moment[0]) - DRIFT * sum[0], fabsf(moment[1]) - DRIFT * sum[1]);
    }
    // Over the thread's columns.
    template <int TILES>
    DEVICE static Row largest_of(const float (&s)[TILES][4]) {
        Row largest = {-INFINITE, -INFINITE};
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) largest[i / 2] = fmaxf(largest[i / 2], s[n][i]);
        }
        return largest;
    }
    DEVICE void raise(const Row& largest) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float higher = fmaxf(maximum[r], maximum_of_row(largest[r]) * factor);
            shrink[r] = exp2_of(maximum[r] - higher);
            maximum[r] = higher;
            sum[r] *= shrink[r], moment[r] *= shrink[r];
        }
    }
    // Scores become p; the sums of p over the thread's columns.
    template <int TILES>
    DEVICE Row exponentials(float (&s)[TILES][4]) const {
        Row sums = {0, 0};
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[n][i] = exp2_of(s[n][i] * factor - maximum[i / 2]);
                sums[i / 2] += s[n][i];
            }
        }
        return sums;
    }
    DEVICE void add(const Row& sums) { sum[0] += sums[0], sum[1] += sums[1]; }
};

// Both weights of a tile as operands of products.
struct WeightPair {
    Weights<1> p, weighted;

    // `of_p` is at most MOST.
    DEVICE void set(const float (&of_p)[BLOCK_K / 8][4], const float (&of_weighted)[BLOCK_K / 8][4]) {
#pragma unroll
        for (int n = 0; n < BLOCK_K / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                int at = n % 2 * 2 + i / 2;
                p.of[0][n / 2][at] = pack_in_range(of_p[n][i], of_p[n][i + 1]);
                weighted.of[0][n / 2][at] = pack(of_weighted[n][i], of_weighted[n][i + 1]);
            }
        }
    }
};
