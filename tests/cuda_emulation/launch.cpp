// A shared library of one kernel, KERNEL_SOURCE, whose argument is an ARGUMENTS, and of a function that runs it.
#include KERNEL_SOURCE

static ARGUMENTS arguments;

extern "C" int arguments_size() { return sizeof(ARGUMENTS); }
extern "C" int shared_size() { return sizeof(Shared); }

extern "C" void launch(const void* packed, int grid_x, int grid_y, int threads, int backwards) {
    std::memcpy(static_cast<void*>(&arguments), packed, sizeof arguments);
    std::vector<uint8_t> shared(sizeof(Shared) + 1024);
    block.shared = shared.data() + (1024 - uintptr_t(shared.data()) % 1024);
    block.shared_bytes = sizeof(Shared);
    block.body = [] { KERNEL_NAME(arguments); };
    for (blockIdx.y = 0; blockIdx.y < grid_y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < grid_x; ++blockIdx.x) run_block(threads, backwards);
    }
}
