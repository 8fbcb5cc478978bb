// Stands in for backends/cuda/include/ptx_weights.cuh, see ptx.cuh in this folder.
#pragma once
#include <ptx.cuh>

inline bool any_lane_says(bool x) { return any_lane(x); }
inline uint32_t pack_in_range(float low, float high) { return pack(low, high); }
