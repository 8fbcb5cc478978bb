// The instructions of the backward pass alone, as ptx_sm90.cuh has the others.
#pragma once
#include <ptx_turns.cuh>

// Two numbers as one register of an operand, which saturate where float16 would overflow.
DEVICE uint32_t pack_finite(float low, float high) {
#if BFLOAT16
    return pack(low, high);
#else
    uint32_t pair;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
}

// Compilers up to CUDA 13.0 at least forget, of left operands in registers, that the next round of a loop needs them, and
// put other numbers there. They believe a branch that they cannot tell is never taken: no stage has this number.
template <int COUNT>
DEVICE void need_here(const uint32_t (&x)[COUNT][4], int stage) {
    asm volatile("" : "+r"(stage));
    if (stage == -1) {
#pragma unroll
        for (int n = 0; n < COUNT; ++n) {
            asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(stage), "r"(x[n][0]), "r"(x[n][1]), "r"(x[n][2]),
                         "r"(x[n][3])
                         : "memory");
        }
    }
}
