// One column of the parts of a row, and what several parts come to.
#pragma once
#include <part_arguments.cuh>

constexpr int IN_FLIGHT = 8;  // parts that a thread reads without waiting for one of them

// Of no keys.
DEVICE Sums no_sums() {
    Sums none = {};
    none.maximum = LOWEST;
    return none;
}

DEVICE Sums load_column(const float* part, int column) {
    Sums sums = {};
    sums.maximum = part[NUMBERS_AT];
    sums.row_sum = part[NUMBERS_AT + 1];
    if constexpr (HAS_MEAN) sums.mean = part[NUMBERS_AT + 2];
#pragma unroll
    for (int i = 0; i < SUMS; ++i) sums.of[i] = part[i * BLOCK_DV + column];
    return sums;
}

// All columns of a part have its numbers, and the first one writes them.
DEVICE void store_column(float* part, int column, const Sums& sums) {
#pragma unroll
    for (int i = 0; i < SUMS; ++i) part[i * BLOCK_DV + column] = sums.of[i];
    if (column) return;
    part[NUMBERS_AT] = sums.maximum;
    part[NUMBERS_AT + 1] = sums.row_sum;
    if constexpr (HAS_MEAN) part[NUMBERS_AT + 2] = sums.mean;
}

// Over the keys of all parts: relative to the largest maximum, and about the mean of all.
template <int COUNT>
DEVICE Sums combined(const Sums (&parts)[COUNT]) {
    Sums all = no_sums();
    float shares[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) all.maximum = fmaxf(all.maximum, parts[i].maximum);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        shares[i] = exp2_of(parts[i].maximum - all.maximum);
        all.row_sum += shares[i] * parts[i].row_sum;
        if constexpr (HAS_MEAN) all.mean += shares[i] * parts[i].row_sum * parts[i].mean;
    }
    if constexpr (HAS_MEAN) all.mean /= fmaxf(all.row_sum, LEAST_SUM);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        all.of[0] += shares[i] * parts[i].of[0];
        if constexpr (HAS_MEAN) {
            all.of[1] += shares[i] * (parts[i].of[1] - (all.mean - parts[i].mean) * parts[i].of[0]);
        }
    }
    return all;
}

// Of `count` parts that lie `stride` numbers apart.
DEVICE Sums merge_column(const float* parts, int stride, int count, int column) {
    Sums all = no_sums();
#pragma unroll 1
    for (int first = 0; first < count; first += IN_FLIGHT) {
        Sums next[IN_FLIGHT + 1];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            next[i] = first + i < count ? load_column(parts + (first + i) * stride, column) : no_sums();
        }
        next[IN_FLIGHT] = all;
        all = combined(next);
    }
    return all;
}

// Where a row's query is, or its output: rows number the queries of a group of heads, head by head.
DEVICE int64_t place_of_row(const PartArguments& g, const int64_t (&strides)[3], int kv, int row) {
    int64_t head = kv % g.num_kv_heads * g.group_size + row / g.seqlen_q;
    return kv / g.num_kv_heads * strides[0] + head * strides[1] + row % g.seqlen_q * strides[2];
}

DEVICE void store_output(const PartArguments& g, int kv, int row, int column, const Sums& sums) {
    if (column >= HEAD_DIM_V) return;
    g.out[place_of_row(g, g.out_strides, kv, row) + column] = uint16_t(pack(output_of(sums), 0));
}
