// All sweeps of a tile of query rows in one launch, with the matrix instructions of one warp.
#include <stream_mma.cuh>
#include <softmax.cuh>
#include <sweeps.cuh>

KERNEL(THREADS, BLOCKS) sweeps_mma(PARAMETER SweepArguments g) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    if (threadIdx.x == 0) shared.tile = QueryTile(g, blockIdx.x);
    sync_block();
    Group group(g, shared);
    run_sweeps(group);
}
