// The parts of one query as a single part: a weighted sum of what they left, since they share their shift.
#include <gram_arguments.cuh>

constexpr int THREADS = 256;
constexpr int MOST_SPLITS = 64;
constexpr int IN_FLIGHT = 8;  // loads of a thread that do not wait for each other

struct Shared {
    float weights[MOST_SPLITS];  // 0 for a part without keys
};

KERNEL(THREADS, 1) gram_merge(PARAMETER GramArguments g) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    int thread = threadIdx.x, element = blockIdx.y * THREADS + thread, splits = g.num_splits;
    const float* parts = g.state + int64_t(blockIdx.x) * splits * PART;
    float reference = -INFINITE;
    for (int split = 0; split < splits; ++split) reference = fmaxf(reference, parts[split * PART]);
    if (thread < splits) {
        const float* part = parts + thread * PART;
        shared.weights[thread] = part[1] > 0 ? exp2_of(part[0] - reference) : 0;
    }
    sync_block();
    if (element >= PART || (element > 1 && element < VECTORS_AT)) return;
    bool is_shift = element >= SHIFT_AT && element < SHIFT_AT + BLOCK_D;
    bool has_keys = parts[1] > 0;  // the first part has keys if any has
    float total = 0;
    for (int first = 0; first < splits; first += IN_FLIGHT) {
        float left[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) left[i] = first + i < splits ? parts[(first + i) * PART + element] : 0;
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            float weight = first + i < splits ? shared.weights[first + i] : 0;
            if (is_shift) weight = first + i == 0 && has_keys;
            if (weight > 0) total += weight * left[i];
        }
    }
    g.merged[int64_t(blockIdx.x) * PART + element] = element == 0 ? reference : total;
}
