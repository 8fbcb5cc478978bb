// The parts of one query as a single part: a weighted sum of what they left, since they share their shift.
#include <gram_arguments.cuh>
#include <ptx_dependent.cuh>

constexpr int THREADS = 256;
constexpr int MOST_SPLITS = 64;
constexpr int IN_FLIGHT = 16;  // loads of a thread that do not wait for each other

struct Shared {
    float weights[MOST_SPLITS];  // 0 for a part without keys
};

// Some parts of a query: four neighbours of what each of them left, and their sum.
struct Fours {
    float4 left[IN_FLIGHT];

    // A part without keys left nothing here, which is read but does not count.
    DEVICE void load(const float* parts, int first, int splits, int element) {
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            const float* part = parts + int64_t(first + i) * PART;
            left[i] = first + i < splits ? *reinterpret_cast<const float4*>(part + element) : float4{};
        }
    }

    DEVICE void add_to(float4& total, const float* weights, int first, int splits) const {
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            float weight = first + i < splits ? weights[first + i] : 0;
            if (weight == 0) continue;
            total.x += weight * left[i].x, total.y += weight * left[i].y;
            total.z += weight * left[i].z, total.w += weight * left[i].w;
        }
    }
};

// The parts' weights, which every warp computes for itself, two parts a lane at most. Returns the reference of all and
// the sum of weights relative to it.
DEVICE float2 weigh_parts(float* weights, const float* parts, int splits, int thread) {
    int lane = thread % 32;
    float own[2], omega[2], reference = -INFINITE, total = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        int split = lane + 32 * i;
        float2 head = split < splits ? *reinterpret_cast<const float2*>(parts + int64_t(split) * PART)
                                     : float2{-INFINITE, 0};
        own[i] = head.x, omega[i] = head.y;
        reference = fmaxf(reference, own[i]);
    }
#pragma unroll
    for (int mask = 16; mask; mask /= 2) reference = fmaxf(reference, from_lane_xor(reference, mask));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float weight = omega[i] > 0 ? exp2_of(own[i] - reference) : 0;
        if (thread < 32) weights[lane + 32 * i] = weight;
        total += weight * omega[i];
    }
#pragma unroll
    for (int mask = 16; mask; mask /= 2) total += from_lane_xor(total, mask);
    return {reference, total};
}

KERNEL(THREADS, 1) gram_merge(PARAMETER GramArguments g) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    int thread = threadIdx.x, element = 4 * (blockIdx.y * THREADS + thread), splits = g.num_splits;
    const float* parts = g.state + int64_t(blockIdx.x) * splits * PART;
    float* merged = g.merged + int64_t(blockIdx.x) * PART;
    bool is_vector = element >= VECTORS_AT && element < PART, is_shift = element >= SHIFT_AT && element < KEY_SUM_AT;
    let_next_kernel_start();
    wait_for_kernel_in_front();
    Fours fours;
    if (is_vector) fours.load(parts, 0, splits, element);
    bool has_keys = parts[1] > 0;  // the first part has keys if any has
    float2 head = weigh_parts(shared.weights, parts, splits, thread);
    sync_block();
    if (element == 0) *reinterpret_cast<float2*>(merged) = head;
    if (!is_vector) return;
    float4 total = {};
    if (is_shift) {
        if (has_keys) total = fours.left[0];
    } else {
        fours.add_to(total, shared.weights, 0, splits);
        for (int first = IN_FLIGHT; first < splits; first += IN_FLIGHT) {
            fours.load(parts, first, splits, element);
            fours.add_to(total, shared.weights, first, splits);
        }
    }
    *reinterpret_cast<float4*>(merged + element) = total;
}
