// Stands in for backends/cuda/include/ptx_transposed.cuh: see ptx.cuh in this folder.
#pragma once
#include <ptx_sm90.cuh>

inline void multiply_transposed(float (&sum)[1][4], uint64_t a, uint64_t b) {
    uint32_t in[4] = {uint32_t(a), uint32_t(a >> 32), uint32_t(b), uint32_t(b >> 32)};
    with_warp(&sum[0][0], in, 4, [](Lane* lanes) {
        struct Product {
            float* sums[32];
            uint64_t left, right;
            int first;
        } product;
        product.left = lanes[0].in[0] | uint64_t(lanes[0].in[1]) << 32;
        product.right = lanes[0].in[2] | uint64_t(lanes[0].in[3]) << 32;
        product.first = current_thread() / 32 % 4 * 16;
        for (int lane = 0; lane < 32; ++lane) product.sums[lane] = static_cast<float*>(lanes[lane].out);
        block.warps[current_thread() / 32].products.push_back([product] {
            for (int lane = 0; lane < 32; ++lane) {
                for (int i = 0; i < 4; ++i) {
                    int row = product.first + lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
                    for (int k = 0; k < 16; ++k) {
                        product.sums[lane][i] +=
                            described_element(product.left, k, row) * described_element(product.right, k, column);
                    }
                }
            }
        });
    });
}
