// Stands in for backends/cuda/include/ptx_turns.cuh, see ptx.cuh in this folder.
#pragma once
#include <ptx_sm90.cuh>

constexpr int FIRST_TURN_BARRIER = 4;

inline void wait_for_turn(int group) { barrier(group + FIRST_TURN_BARRIER, 256); }
inline void give_turn(int group) {
    Barrier& turn = block.barriers[group + FIRST_TURN_BARRIER];
    ++block.events;
    require(turn.arrived < 256, "a turn given twice");
    if (++turn.arrived == 256) turn.arrived = 0, ++turn.turn;
}
