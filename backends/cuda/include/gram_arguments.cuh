// What all kernels of decoding are given, and where the parts of a query lie in the state.
#pragma once
#include <ptx.cuh>

// gram_launcher.py packs these fields, in this order.
struct GramArguments {
    const uint16_t *q, *k, *v;
    const int32_t *seqlens, *block_table;  // null: every sequence has `capacity` keys; the cache is dense
    const float *scale_pointer, *ridge_pointer;  // null: the numbers below hold for all queries
    float *state, *merged;
    uint16_t* out;
    int32_t* iterations;  // null, and so is the next one, if nobody asks
    float* final_residual;
    int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3], ridge_strides[3];  // batch or page, head, row
    int64_t table_stride;
    float scale, ridge, cg_tol;
    int32_t cg_max_iters, num_kv_heads, group_size, seqlen_q, capacity, window, num_splits;  // window 0: none
};

// A *part* is what one query sees of one of `num_splits` stretches of keys. It leaves, relative to exp2(reference),
// with x_j = round(w_j (k_j - shift)) and one shift for all parts of a query, float32 numbers one after another:
//     reference, omega = sum_j w_j, and room up to VECTORS_AT
//     shift, sum_j x_j, sum_j w_j v_j
//     sum_j x_j k_j^T, sum_j x_j v_j^T
// The rounded x_j stand on the left of both sums, and the solve takes the transposed covariance: see
// lla_compile/gram.py for why no rounding then grows with the probe. A part without keys has omega 0 and leaves
// nothing else. Parts of one reference merge by adding up what they left.
constexpr int VECTORS_AT = 16;
constexpr int SHIFT_AT = VECTORS_AT;
constexpr int KEY_SUM_AT = SHIFT_AT + BLOCK_D;
constexpr int VALUE_SUM_AT = KEY_SUM_AT + BLOCK_D;
constexpr int KEYS_AT = VALUE_SUM_AT + BLOCK_DV;
constexpr int VALUES_AT = KEYS_AT + BLOCK_D * BLOCK_D;
constexpr int PART = VALUES_AT + BLOCK_D * BLOCK_DV;

// Which query, by its place among all of them: batch, head, row.
struct QueryIndex {
    int64_t batch, head, row;
};

DEVICE QueryIndex query_index(const GramArguments& g, int query) {
    int num_heads = g.num_kv_heads * g.group_size;
    return {query / (num_heads * g.seqlen_q), query / g.seqlen_q % num_heads, query % g.seqlen_q};
}
