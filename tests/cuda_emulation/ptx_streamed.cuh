// Stands in for backends/cuda/include/ptx_streamed.cuh: see ptx.cuh in this folder.
#pragma once
#include <ptx.cuh>

inline void copy_16_streamed(uint32_t to, const void* from) { copy_16_async(to, from); }
inline void copy_16_streamed(uint32_t to, const void* from, int bytes) { copy_part_of_16_async(to, from, bytes); }
