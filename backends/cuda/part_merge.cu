// The parts of one row as its output. Groups of threads take every GROUPS-th part, one column each, and then the first
// group what they have found.
#include <part_column.cuh>

constexpr int THREADS = GROUPS * BLOCK_DV;

struct Shared {
    float found[GROUPS][PART];
};

KERNEL(THREADS, 1) part_merge(PARAMETER PartArguments g) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    int thread = threadIdx.x, group = thread / BLOCK_DV, column = thread % BLOCK_DV;
    int rows = g.group_size * g.seqlen_q;
    const float* parts = g.parts + int64_t(blockIdx.x) * g.num_splits * PART;
    int count = (g.num_splits - group + GROUPS - 1) / GROUPS;
    Sums sums = merge_column(parts + group * PART, GROUPS * PART, count, column);
    store_column(shared.found[group], column, sums);
    sync_block();
    if (group) return;
    sums = merge_column(shared.found[0], PART, GROUPS, column);
    store_output(g, blockIdx.x / rows, blockIdx.x % rows, column, sums);
}
