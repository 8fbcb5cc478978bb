// Products of tiles whose rows are summed over, for compute capability 9.0.
#pragma once
#include <ptx_sm90.cuh>

// sum += a^T b: 64 x 8 += (16 x 64)^T (16 x 8), both in shared memory as describe_operand has them.
DEVICE void multiply_transposed(float (&sum)[1][4], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32." OPERANDS " {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 1, 1;"
        : SUM_OF_TILE(0)
        : "l"(a), "l"(b));
}
