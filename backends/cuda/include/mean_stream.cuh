// Sweeps with two sums, with the matrix instructions of the kernel.
#pragma once
#if WGMMA
#include <mean_stream_wgmma.cuh>
#else
#include <mean_stream_mma.cuh>
#endif
