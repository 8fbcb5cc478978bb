// The weights of a tile of keys, on their way from scores to operands of products.
#pragma once
#include <row_state.cuh>

// p becomes weight(p, t - center).
template <class F>
DEVICE void combine(float (&p)[BLOCK_K / 8][4], const float (&t)[BLOCK_K / 8][4], const Row& center, F weight) {
#pragma unroll
    for (int n = 0; n < BLOCK_K / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) p[n][i] = weight(p[n][i], t[n][i] - center[i / 2], i / 2);
    }
}

// The weights of a tile of keys, as the left operand of products.
template <int T>
struct Weights {
    uint32_t of[T][STEPS][4];

    // Returns their sums over the thread's columns, as products see them.
    DEVICE Row set(const float (&p)[BLOCK_K / 8][4]) {
        Row sums = {0, 0};
#pragma unroll
        for (int n = 0; n < BLOCK_K / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                float x = p[n][i], y = p[n][i + 1];
                uint32_t pair = pack(x, y);
                int at = n % 2 * 2 + i / 2;
                of[0][n / 2][at] = pair;
                if constexpr (T == 2) {
                    of[1][n / 2][at] = pack(x - low_half(pair), y - high_half(pair));
                    sums[i / 2] += x + y;
                } else {
                    sums[i / 2] += low_half(pair) + high_half(pair);
                }
            }
        }
        return sums;
    }
};
