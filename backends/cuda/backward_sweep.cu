// One sweep of a backward pass that solves nothing: a block's query rows or keys, and all of the other side that they see.
#include <stage_copier.cuh>
#include <stream_saved.cuh>
#include <sweep.cuh>

KERNEL(THREADS, BLOCKS) SWEEP(PARAMETER SweepArguments g) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    if (threadIdx.x == 0) {
        shared.block = HeldBlock(g, blockIdx.x);
        for (int stage = 0; stage < STAGES; ++stage) {
            init_barrier(&shared.full[stage], GROUP);
            init_barrier(&shared.empty[stage], RELEASES);
        }
    }
    sync_block();
    if (PACKED && !shared.block.held) return;  // there are blocks for the most tiles that there can be
    if (threadIdx.x >= GROUP * ROW_GROUPS) {
        give_registers<COPY_REGISTERS>();
        Copier copier = {g, shared};
        copy_sweep(copier);
    } else {
        take_registers<ROW_REGISTERS>();
        Group group(g, shared);
        run_sweep(group);
    }
}
