// Streaming keys past query rows for two sums of values, whose weights come of two scores: see mean_softmax.cuh, and
// stream_wgmma.cuh for the ring, the products and what a group is.
//
// Products of a tile's weights with values run while the next tile's scores become weights. Where registers are there for
// it (SCORES_AHEAD == 2) so do the second scores' products; else those wait until the values' products have left their
// operands, and the groups of rows of a block fill each other's waits. A warp whose maxima have been outgrown makes the
// scores of its rows anew by its own instructions.
#pragma once
#include <mean_softmax.cuh>
#include <operands_mma.cuh>
#include <stream_wgmma.cuh>

// One pass over keys and values:
//     sum[i] = sum over j of p[i, j] v_j        moment[i] = sum over j of weight(p[i, j], a[i, j]) v_j
// with a = probe . k_j relative to its mean under p.
template <int WIDTH, class F>
DEVICE void stream_means(Group& group, Vector<WIDTH>& sum, Vector<WIDTH>& moment, MeanSoftmax& softmax,
                         const QueryRows& probe, F weight) {
    constexpr bool AHEAD = SCORES_AHEAD == 2;
    const QueryTile& tile = group.tile;
    Turn& turn = group.turn;
    TileRange range = tile.tiles_of<GROUP_ROWS>(tile.first_row + GROUP_ROWS * group.number(), tile.first_key / BLOCK_K);
    int begin = max(range.begin, 0), end = max(range.end, begin);
    assign(sum, [](int, int) { return 0.0f; });
    assign(moment, [](int, int) { return 0.0f; });
    group.pass(begin * 2);
    if (begin < end) {
        float s[BLOCK_K / 8][4], a[BLOCK_K / 8][4];
        WeightPair weights;
        Turn values = turn.following();
        auto prepare = [&](int at) {
            softmax.scale(s);
            if (range.cuts(at)) group.mask(s, at);
        };
        auto weigh_anew = [&](int at) {
            multiply_by_warp(s, group.q, group.stage(turn));
            prepare(at);
            softmax.weigh_anew(s);
        };
        // Descriptors are made anew for every tile where there are no registers to keep them in.
        auto start_rows = [&](float(&scores)[BLOCK_K / 8][4], const QueryRows& rows) {
            group.start_rows<false>(scores, rows.tile + (AHEAD ? 0 : anew(0)), turn);
        };
        auto start_second = [&] {
            start_rows(a, probe);
            commit_products();
        };
        group.wait_for(turn, values);
        begin_products();
        start_rows(s, group.q);
        commit_products();
        start_second();
        wait_product_groups<1>();
        hold_all(s);
        prepare(begin);
        softmax.weigh_once(s);
        wait_product_groups<0>();
        hold_all(a);
        group.release(turn);
        if (softmax.moves) softmax.move(s, a, sum, moment);
        softmax.combine(s, a, weight);
        weights.set(s, a);
        turn = values.following();
#pragma unroll 1
        for (int at = begin + 1; at < end; ++at) {
            // `turn` has the keys of tile `at`, `values` its values, `held` those of the tile before.
            Turn held = turn.before();
            values = turn.following();
            group.wait_for(turn, values);
            hold_all(sum.x), hold_all(moment.x);
            hold_weights(weights.p), hold_weights(weights.weighted);
            begin_products();
            start_rows(s, group.q);
            commit_products();
            if constexpr (AHEAD) start_second();
            group.start_sum<ValueTile>(sum, weights.p, held);
            group.start_sum<ValueTile>(moment, weights.weighted, held);
            commit_products();
            wait_product_groups<AHEAD ? 2 : 1>();
            hold_all(s);
            prepare(at);
            softmax.weigh(s);
            if (softmax.moves) {  // a jump, which waits for products are not moved before
                if constexpr (!AHEAD) {
                    wait_product_groups<0>();
                    hold_all(sum.x), hold_all(moment.x);
                    hold_weights(weights.p), hold_weights(weights.weighted);
                }
                weigh_anew(at);
            }
            if constexpr (AHEAD) {
                wait_product_groups<1>();
                hold_all(a);
                if (softmax.moves) {
                    wait_product_groups<0>();
                    hold_all(sum.x), hold_all(moment.x);
                    softmax.move(s, a, sum, moment);
                }
                group.release(turn);
                softmax.combine(s, a, weight);
            }
            wait_product_groups<0>();
            hold_all(sum.x), hold_all(moment.x);
            hold_weights(weights.p), hold_weights(weights.weighted);
            group.release(held);
            if constexpr (!AHEAD) {
                begin_products();
                start_second();
                wait_product_groups<0>();
                hold_all(a);
                group.release(turn);
                if (softmax.moves) softmax.move(s, a, sum, moment);
                softmax.combine(s, a, weight);
            }
            weights.set(s, a);
            turn = values.following();
        }
        Turn held = turn.before();
        hold_all(sum.x), hold_all(moment.x);
        hold_weights(weights.p), hold_weights(weights.weighted);
        begin_products();
        group.start_sum<ValueTile>(sum, weights.p, held);
        group.start_sum<ValueTile>(moment, weights.weighted, held);
        commit_products();
        wait_product_groups<0>();
        hold_all(sum.x), hold_all(moment.x);
        group.release(held);
    }
    group.pass((tile.key_tiles - end) * 2);
}
