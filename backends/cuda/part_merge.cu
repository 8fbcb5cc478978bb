// The parts of one row as its output, COLUMNS columns to a block. Each of GROUPS groups of threads merges every
// GROUPS-th part, and then the first group what all have found: many parts are read at once, few one after another.
#include <part_column.cuh>

constexpr int COLUMNS = BLOCK_DV < 32 ? BLOCK_DV : 32;
constexpr int THREADS = GROUPS * COLUMNS;

struct Shared {
    float found[GROUPS][PART];  // of the block's columns, as if they were the first ones
};

KERNEL(THREADS, 1) part_merge(PARAMETER PartArguments g) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    int thread = threadIdx.x, group = thread / COLUMNS, local = thread % COLUMNS;
    int rows = g.group_size * g.seqlen_q, column = blockIdx.y * COLUMNS + local;
    const float* parts = g.parts + int64_t(blockIdx.x) * g.num_splits * PART;
    int count = (g.num_splits - group + GROUPS - 1) / GROUPS;
    store_column(shared.found[group], local, merge_column(parts + group * PART, GROUPS * PART, count, column));
    sync_block();
    if (group) return;
    Sums sums = merge_column(shared.found[0], PART, GROUPS, local);
    store_output(g, blockIdx.x / rows, blockIdx.x % rows, column, sums);
}
