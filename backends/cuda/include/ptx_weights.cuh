// More instructions that C++ has no word for, see ptx.cuh: for weights of a softmax.
#pragma once
#include <ptx.cuh>

// Whether some lane says so, for all of them.
DEVICE bool any_lane_says(bool x) { return __any_sync(0xffffffffu, x); }

// `pack` of numbers that are in the range of the type.
DEVICE uint32_t pack_in_range(float low, float high) {
#if BFLOAT16
    return pack(low, high);
#else
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
}
