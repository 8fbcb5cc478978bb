// Streaming keys past query rows for two sums of values with the matrix instructions of one warp: as
// mean_stream_wgmma.cuh, see stream_mma.cuh for the ring and the operands.
//
// Scores of both products take every key from shared memory once, both sums every value.
#pragma once
#include <mean_softmax.cuh>
#include <stream_mma.cuh>

// s = q . k and a = probe . k
DEVICE void multiply_two_rows(float (&s)[BLOCK_K / 8][4], float (&a)[BLOCK_K / 8][4], const QueryRows& q,
                              const QueryRows& probe, uint32_t keys) {
#pragma unroll
    for (int n = 0; n < BLOCK_K / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = a[n][i] = 0;
    }
#pragma unroll
    for (int step = 0; step < BLOCK_D / 16; ++step) {
        uint32_t query[4], second[4];
        load_matrices(query, left_operand(q, 2 * step));
        load_matrices(second, left_operand(probe, 2 * step));
#pragma unroll
        for (int n = 0; n < BLOCK_K / 16; ++n) {
            uint32_t key[4];
            load_matrices(key, columns_operand<KeyTile>(keys, 16 * n, 2 * step));
            multiply_pair(s[2 * n], s[2 * n + 1], query, key);
            multiply_pair(a[2 * n], a[2 * n + 1], second, key);
        }
    }
}

// Both sums += weights times values.
template <int WIDTH>
DEVICE void add_two_sums(Vector<WIDTH>& sum, Vector<WIDTH>& moment, const WeightPair& weights, uint32_t values) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
        for (int n = 0; n < WIDTH / 16; ++n) {
            uint32_t value[4];
            load_matrices_transposed(value, rows_operand<ValueTile>(values, 16 * step, 2 * n));
            multiply_pair(sum.x[2 * n], sum.x[2 * n + 1], weights.p.of[0][step], value);
            multiply_pair(moment.x[2 * n], moment.x[2 * n + 1], weights.weighted.of[0][step], value);
        }
    }
}

// One pass over keys and values. A warp leaves out the tiles that none of its rows sees.
template <int WIDTH, class F>
DEVICE void stream_means(Group& group, Vector<WIDTH>& sum, Vector<WIDTH>& moment, MeanSoftmax& softmax,
                         const QueryRows& probe, F weight) {
    const QueryTile& tile = group.tile;
    int first = tile.first_row + uniform(thread_anew() / 32) * 16;
    TileRange range = tile.tiles_of<16>(first, tile.first_key / BLOCK_K);
    assign(sum, [](int, int) { return 0.0f; });
    assign(moment, [](int, int) { return 0.0f; });
    Group::Ring<true> ring(group);
#pragma unroll 1
    for (int at = 0; at < tile.key_tiles; ++at) {
        bool sees = at >= range.begin && at < range.end;
        uint32_t keys = ring.next();
        WeightPair weights;
        if (sees) {
            float s[BLOCK_K / 8][4], a[BLOCK_K / 8][4];
            multiply_two_rows(s, a, group.q, probe, keys);
            softmax.scale(s);
            if (range.cuts(at)) group.mask(s, at);
            softmax.weigh_once(s);
            if (softmax.moves) softmax.move(s, a, sum, moment);
            softmax.combine(s, a, weight);
            weights.set(s, a);
        }
        uint32_t values = ring.next();
        if (sees) add_two_sums(sum, moment, weights, values);
    }
    ring.end();
}
