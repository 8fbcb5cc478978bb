// (C^T + ridge I) u = kbar - q and o = vbar - G^T u, one block for each query.
//
// Conjugate gradients first: where keys are many they end long before an elimination would. Where they have not ended
// after DIRECT_AFTER iterations, which take about as long as an elimination, the matrix is eliminated, and what its
// residual then still is over the tolerance goes back to conjugate gradients.
#include <dense_system.cuh>
#include <gram_arguments.cuh>
#include <ptx_dependent.cuh>

constexpr int ROUNDS = 3;  // of conjugate gradients, each from a residual computed anew

struct Shared {
    SystemShared system;
    float row_mean[BLOCK_D], key_mean[BLOCK_D], value_mean[BLOCK_DV];
    float partial[SOLVE_WARPS][BLOCK_DV];
#if VALUES_AHEAD
    alignas(16) float values[BLOCK_D * BLOCK_DV];  // fetched during the solve, where there is room
#endif
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

// The thread's elements of q, as the Vector of a system: no other kernel of this call writes it.
DEVICE Vector load_query(const GramArguments& g, const QueryIndex& at, int lane) {
    const uint16_t* q = g.q + at.batch * g.q_strides[0] + at.head * g.q_strides[1] + at.row * g.q_strides[2];
    Vector query;
#pragma unroll
    for (int c = 0; c < LANES; ++c) query.x[c] = lane + 32 * c < HEAD_DIM ? low_half(q[lane + 32 * c]) : 0;
    return query;
}

// Means and the system's matrix, from the sums of the query's only part; zeros if it has no keys: what it left is read
// then too, so that no load waits for another, and does not count. Copies of the sums of values follow, where there is
// room for them.
DEVICE void load_moments(Shared& shared, System& system, const GramArguments& g, const QueryIndex& at,
                         const float* state, int thread) {
    static_assert(BLOCK_D <= SOLVE_THREADS && BLOCK_DV <= SOLVE_THREADS);
    const System::Own& own = system.own;
    float omega = state[1];
    bool is_key = thread < BLOCK_D, is_value = thread < BLOCK_DV;
    float key_sum = is_key ? state[KEY_SUM_AT + thread] : 0, shift = is_key ? state[SHIFT_AT + thread] : 0;
    float value_sum = is_value ? state[VALUE_SUM_AT + thread] : 0;
    float4 sums[System::Own::COUNT];
#pragma unroll
    for (int n = 0; n < own.COUNT; ++n) {
        sums[n] = own.has(n) ? *reinterpret_cast<const float4*>(state + KEYS_AT + own.at(n)) : float4{};
    }
    float ridge = g.ridge;
    if (g.ridge_pointer) {
        const int64_t(&strides)[3] = g.ridge_strides;
        ridge = g.ridge_pointer[at.batch * strides[0] + at.head * strides[1] + at.row * strides[2]];
    }
    bool there = omega > 0;
    float inverse = there ? 1.0f / omega : 0;
    if (is_key) {
        float mean = there ? key_sum * inverse : 0;
        shared.row_mean[thread] = mean;
        shared.key_mean[thread] = there ? shift + mean : 0;
    }
    if (is_value) shared.value_mean[thread] = there ? value_sum * inverse : 0;
    sync_block();
    float key_mean[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) key_mean[m] = shared.key_mean[own.column + m];
#pragma unroll
    for (int n = 0; n < own.COUNT; ++n) {
        if (!own.has(n)) break;
        int row = own.row_of(n);
        float mean = shared.row_mean[row], sum[4] = {sums[n].x, sums[n].y, sums[n].z, sums[n].w};
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            float moment = (there ? sum[m] : 0) * inverse - mean * key_mean[m];
            system.fours[n][m] = moment + (own.column + m == row ? ridge : 0);
        }
    }
#if VALUES_AHEAD
    OwnFours<BLOCK_DV> values(thread);
#pragma unroll
    for (int n = 0; n < values.COUNT; ++n) {
        int at = values.at(n);
        if (values.has(n)) copy_16_async(shared_address(shared.values + at), state + VALUES_AT + at);
    }
    commit_copies();
#endif
}

// vbar - G^T u, rounded.
DEVICE void store_output(Shared& shared, const GramArguments& g, const QueryIndex& at, const float* state,
                         const float* u, int thread) {
    bool there = state[1] > 0;
    float inverse = there ? 1.0f / state[1] : 0;
#if VALUES_AHEAD
    wait_copies<0>();  // of what this thread has
    const float* sums = shared.values;
#else
    const float* sums = state + VALUES_AT;
#endif
    OwnFours<BLOCK_DV> fours(thread);
    constexpr int QUADS = fours.QUADS;
    int column = fours.column;
    float total[4] = {};
    if (there) {
#pragma unroll 16
        for (int i = 0; i < fours.COUNT; ++i) {
            if (!fours.has(i)) break;
            int row = fours.row_of(i);
            float4 sum = *reinterpret_cast<const float4*>(sums + fours.at(i));
            float mean = shared.row_mean[row], x = u[row], c[4] = {sum.x, sum.y, sum.z, sum.w};
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
    Vector query = load_query(g, at, thread % 32);
    wait_for_kernel_in_front();
    System system(shared.system, thread);
    load_moments(shared, system, g, at, state, thread);
    bool there = state[1] > 0;
    Vector right = system.vector(shared.key_mean);
#pragma unroll
    for (int c = 0; c < LANES; ++c) right.x[c] = there ? right.x[c] - query.x[c] : 0;
    float norm2 = dot(right, right), enough = g.cg_tol * g.cg_tol * norm2;
    Solution s = {{}, right, norm2};
    int iterations = 0;
    conjugate_gradients(system, s, right, enough, min(g.cg_max_iters, DIRECT_AFTER), iterations);
    if (s.rho > enough && g.cg_max_iters > DIRECT_AFTER) {
        Vector u = system.eliminate(right);
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
