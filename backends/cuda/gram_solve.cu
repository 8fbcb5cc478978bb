// (C^T + ridge I) u = kbar - q and o = vbar - G^T u, one block for each query.
//
// Conjugate gradients first: where keys are many they end long before an elimination would. Where they have not ended
// after DIRECT_AFTER iterations, which take about as long as an elimination, the matrix is eliminated, and what its
// residual then still is over the tolerance goes back to conjugate gradients.
#include <dense_system.cuh>
#include <gram_arguments.cuh>

constexpr int ROUNDS = 3;  // of conjugate gradients, each from a residual computed anew

struct Shared {
    SystemShared system;
    float row_mean[BLOCK_D], key_mean[BLOCK_D], value_mean[BLOCK_DV];
    float partial[SOLVE_WARPS][BLOCK_DV];
};

struct Solution {
    Vector u, residual;
    float rho;  // |residual|^2
};

// residual = right - A u and its square.
DEVICE Solution checked(System& system, const Vector& right, const Vector& u) {
    Vector image = system.times(u);
    Solution s = {u};
#pragma unroll
    for (int c = 0; c < LANES; ++c) s.residual.x[c] = right.x[c] - image.x[c];
    s.rho = dot(s.residual, s.residual);
    return s;
}

// A is symmetric but for rounding, so that the recurrence is off by a little: when it ends, the residual is computed
// anew, and it goes on from there while that is not small enough. Curvature that is not positive ends a round.
DEVICE void conjugate_gradients(System& system, Solution& s, const Vector& right, float enough, int limit,
                                int& iterations) {
    for (int round = 0; round < ROUNDS && s.rho > enough && iterations < limit; ++round) {
        Vector direction = s.residual;
        for (bool going = true; going;) {
            Vector image = system.times(direction);
            float curvature = dot(direction, image);
            bool sound = curvature > 0;
            float step = sound ? s.rho / curvature : 0;
#pragma unroll
            for (int c = 0; c < LANES; ++c) {
                s.u.x[c] += step * direction.x[c];
                s.residual.x[c] -= step * image.x[c];
            }
            float previous = s.rho;
            s.rho = dot(s.residual, s.residual);
#pragma unroll
            for (int c = 0; c < LANES; ++c) direction.x[c] = s.residual.x[c] + s.rho / previous * direction.x[c];
            ++iterations;
            going = sound && s.rho > enough && iterations < limit;
        }
        s = checked(system, right, s.u);
    }
}

// Mean, covariances' corrections and the matrix, from the sums of the query's only part; zeros if it has no keys.
DEVICE void load_moments(Shared& shared, const GramArguments& g, const QueryIndex& at, const float* state, int thread) {
    float omega = state[1];
    bool there = omega > 0;
    float inverse = there ? 1.0f / omega : 0;
    for (int d = thread; d < BLOCK_D; d += SOLVE_THREADS) {
        float mean = there ? state[KEY_SUM_AT + d] * inverse : 0;
        shared.row_mean[d] = mean;
        shared.key_mean[d] = there ? state[SHIFT_AT + d] + mean : 0;
    }
    for (int d = thread; d < BLOCK_DV; d += SOLVE_THREADS) {
        shared.value_mean[d] = there ? state[VALUE_SUM_AT + d] * inverse : 0;
    }
    sync_block();
    float ridge = g.ridge;
    if (g.ridge_pointer) {
        const int64_t(&strides)[3] = g.ridge_strides;
        ridge = g.ridge_pointer[at.batch * strides[0] + at.head * strides[1] + at.row * strides[2]];
    }
    constexpr int QUADS = BLOCK_D / 4;
    const float4* sums = reinterpret_cast<const float4*>(state + KEYS_AT);
#pragma unroll 16
    for (int n = thread; n < BLOCK_D * QUADS; n += SOLVE_THREADS) {
        int j = n / QUADS, i = n % QUADS * 4;
        float4 sum = there ? sums[n] : float4{};
        float mean = shared.row_mean[j];
        float c[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int m = 0; m < 4; ++m) c[m] = c[m] * inverse - mean * shared.key_mean[i + m] + (i + m == j ? ridge : 0);
        float2* to = reinterpret_cast<float2*>(shared.system.matrix + j * PITCH + i);
        to[0] = {c[0], c[1]}, to[1] = {c[2], c[3]};
    }
    sync_block();
}

// vbar - G^T u, rounded.
DEVICE void store_output(Shared& shared, const GramArguments& g, const QueryIndex& at, const float* state,
                         const float* u, int thread) {
    constexpr int QUADS = BLOCK_DV / 4;
    bool there = state[1] > 0;
    float inverse = there ? 1.0f / state[1] : 0;
    const float4* sums = reinterpret_cast<const float4*>(state + VALUES_AT);
    int column = thread % QUADS * 4;
    float total[4] = {};
    if (there) {
#pragma unroll 16
        for (int d = thread / QUADS; d < BLOCK_D; d += SOLVE_THREADS / QUADS) {
            float4 sum = sums[d * QUADS + thread % QUADS];
            float mean = shared.row_mean[d], x = u[d], c[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
            for (int m = 0; m < 4; ++m) total[m] += (c[m] * inverse - mean * shared.value_mean[column + m]) * x;
        }
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int mask = QUADS; mask < 32; mask *= 2) total[m] += from_lane_xor(total[m], mask);
        if (thread % 32 < QUADS) shared.partial[thread / 32][column + m] = total[m];
    }
    sync_block();
    if (thread >= HEAD_DIM_V) return;
    float out = shared.value_mean[thread];
#pragma unroll
    for (int warp = 0; warp < SOLVE_WARPS; ++warp) out -= shared.partial[warp][thread];
    uint16_t* to = g.out + at.batch * g.out_strides[0] + at.head * g.out_strides[1] + at.row * g.out_strides[2];
    to[thread] = static_cast<uint16_t>(pack(out, 0));
}

KERNEL(SOLVE_THREADS, SOLVE_BLOCKS) gram_solve(PARAMETER GramArguments g) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    int thread = threadIdx.x;
    QueryIndex at = query_index(g, blockIdx.x);
    const float* state = g.merged + int64_t(blockIdx.x) * PART;
    load_moments(shared, g, at, state, thread);

    System system(shared.system, thread);
    system.load();
    bool there = state[1] > 0;
    const uint16_t* q = g.q + at.batch * g.q_strides[0] + at.head * g.q_strides[1] + at.row * g.q_strides[2];
    Vector right = system.vector(shared.key_mean);
#pragma unroll
    for (int c = 0; c < LANES; ++c) {
        int d = system.lane + 32 * c;
        right.x[c] = there && d < HEAD_DIM ? right.x[c] - low_half(q[d]) : 0;
    }
    float norm2 = dot(right, right), enough = g.cg_tol * g.cg_tol * norm2;
    Solution s = {{}, right, norm2};
    int iterations = 0;
    conjugate_gradients(system, s, right, enough, min(g.cg_max_iters, DIRECT_AFTER), iterations);
    if (s.rho > enough && g.cg_max_iters > DIRECT_AFTER) {
        Vector u = system.eliminate(right);
        system.load();
        Solution direct = checked(system, right, u);
        if (direct.rho < s.rho) s = direct;
        ++iterations;
        conjugate_gradients(system, s, right, enough, g.cg_max_iters, iterations);
    }
    store_output(shared, g, at, state, system.spread(s.u), thread);
    if (thread == 0 && g.iterations) {
        g.iterations[blockIdx.x] = iterations;
        g.final_residual[blockIdx.x] = norm2 > 0 ? square_root(s.rho / norm2) : 0;
    }
}
