// All sweeps of a tile of query rows in one launch, with the matrix instructions of four warps.
#include <stream_wgmma.cuh>
#include <softmax.cuh>
#include <sweeps.cuh>
#include <copies.cuh>

KERNEL(THREADS, BLOCKS) sweeps_wgmma(PARAMETER SweepArguments g) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    if (threadIdx.x == 0) {
        shared.tile = QueryTile(g, blockIdx.x);
        init_barrier(&shared.met, THREADS);
        for (int stage = 0; stage < STAGES; ++stage) {
            init_barrier(&shared.full[stage], GROUP);
            init_barrier(&shared.empty[stage], 4 * ROW_GROUPS);
        }
    }
    sync_block();
    if (threadIdx.x >= GROUP * ROW_GROUPS) {
        give_registers<COPY_REGISTERS>();
        Copier copier = {g, shared};
        copy_sweeps(copier);
    } else {
        take_registers<ROW_REGISTERS>();
        Group group(g, shared);
        run_sweeps(group);
    }
}
