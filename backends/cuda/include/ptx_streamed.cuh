// Asynchronous copies of what the L2 cache shall drop first.
#pragma once
#include <ptx.cuh>

DEVICE uint64_t drop_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

DEVICE void copy_16_streamed(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(drop_first())
                 : "memory");
}
// The first `bytes` of 16, the others are zero.
DEVICE void copy_16_streamed(uint32_t to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from), "r"(bytes),
                 "l"(drop_first())
                 : "memory");
}
