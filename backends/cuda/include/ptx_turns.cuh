// Groups of four warps take turns at the tensor cores, for compute capability 9.0.
#pragma once
#include <ptx_sm90.cuh>

constexpr int FIRST_TURN_BARRIER = 4;  // those before are the block's and the groups'

// Wait until it is the turn of one of the groups, which count from 0.
DEVICE void wait_for_turn(int group) {
    asm volatile("bar.sync %0, 256;" ::"r"(group + FIRST_TURN_BARRIER) : "memory");
}
DEVICE void give_turn(int group) {
    asm volatile("bar.arrive %0, 256;" ::"r"(group + FIRST_TURN_BARRIER) : "memory");
}
