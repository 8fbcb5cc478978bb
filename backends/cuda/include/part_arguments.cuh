// What the kernels of decoding in parts are given, and where a part of a row lies.
#pragma once
#include <part_sums.cuh>

// part_launcher.py packs these fields, in this order.
struct PartArguments {
    const uint16_t* rows[ROW_INPUTS];  // queries, then probes if the operator has them
    const uint16_t *k, *v;
    const int32_t *seqlens, *block_table;  // null: every sequence has `capacity` keys; the cache is dense
    const float* scale_pointer;            // null: `scale` counts
    float* parts;
    uint16_t* out;
    int64_t row_strides[ROW_INPUTS][3], k_strides[3], v_strides[3], out_strides[3];  // batch or page, head, row
    int64_t table_stride;
    float scale;
    int32_t num_kv_heads, group_size, seqlen_q, capacity, window, num_splits;  // window 0: none
};

// A *part* is what a row has summed over one of `num_splits` stretches of keys, relative to exp2(maximum): BLOCK_DV
// columns of each sum, and after them maximum, row sum and mean. Parts lie in the order of (sequence and key head, row,
// part); one of PART numbers.
constexpr int NUMBERS_AT = SUMS * BLOCK_DV;
static_assert(NUMBERS_AT + NUMBERS <= PART);

constexpr bool HAS_MEAN = NUMBERS > 2;
// Less than any score: a maximum that nothing is less than, and that -inf less it is -inf.
constexpr float LOWEST = -1e30f;
constexpr float LEAST_SUM = 1e-30f;  // of a row without keys, to divide by
