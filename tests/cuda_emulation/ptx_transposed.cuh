// Stands in for backends/cuda/include/ptx_transposed.cuh: see ptx.cuh in this folder.
#pragma once
#include <ptx_sm90.cuh>

inline void multiply_transposed(float (&sum)[1][4], uint64_t a, uint64_t b) {
    uint32_t in[4] = {uint32_t(a), uint32_t(a >> 32), uint32_t(b), uint32_t(b >> 32)};
    with_warp(&sum[0][0], in, 4, [](Lane* lanes) {
        uint64_t a = lanes[0].in[0] | uint64_t(lanes[0].in[1]) << 32, b = lanes[0].in[2] | uint64_t(lanes[0].in[3]) << 32;
        int first = current_thread() / 32 % 4 * 16;
        auto left = [=](float (&to)[16][16]) {
            for (int row = 0; row < 16; ++row) {
                for (int k = 0; k < 16; ++k) to[row][k] = described_element(a, k, first + row);
            }
        };
        multiply_described<1, 1>(lanes, left, [=](int n, int k) { return described_element(b, k, n); });
    });
}
