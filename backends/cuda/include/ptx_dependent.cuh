// Kernels that start while the one in front still runs, from compute capability 9.0 on; see dependent_launch.py.
#pragma once
#include <ptx.cuh>

// Until the kernel in front has ended, and with it those that it waited for: what they wrote is seen after.
DEVICE void wait_for_kernel_in_front() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Once all blocks have called it or ended, the next kernel's blocks may take what room there is.
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
