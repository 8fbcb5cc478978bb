// In which order the query tiles of packed sequences run: a table of (sequence, tile) by rank, worked out on the device,
// since the host never sees the lengths. Tiles with most keys go first, so that short ones fill the tail; before all the
// first tiles of causal sequences, whose rows take the most iterations. Ranks beyond the last tile have sequence -1.
#include <sweep_arguments.cuh>

constexpr int THREADS = 128;
constexpr int FIRST = 1 << 30;  // the work of a first tile

struct Shared {};

struct Sequence {
    int queries, keys;

    DEVICE Sequence(const SweepArguments& g, int number)
        : queries(g.cu_seqlens_q[number + 1] - g.cu_seqlens_q[number]),
          keys(g.cu_seqlens_k[number + 1] - g.cu_seqlens_k[number]) {}

    DEVICE int tiles() const { return (queries + BLOCK_Q - 1) / BLOCK_Q; }

    // Keys that the last row of a tile sees.
    DEVICE int work(int tile) const {
        if (!CAUSAL) return keys;
        return tile ? max(min((tile + 1) * BLOCK_Q - queries, 0) + keys, 0) : FIRST;
    }
    // How many tiles have so much work or more. But for the first, the work of tiles grows with their number.
    DEVICE int tiles_with(int least) const {
        if (!CAUSAL) return keys >= least ? tiles() : 0;
        if (!tiles() || least > FIRST) return 0;
        if (keys < least) return 1;
        int from = least > 0 ? (least - keys + queries + BLOCK_Q - 1) / BLOCK_Q - 1 : 1;
        return tiles() - max(from, 1) + 1;
    }
};

KERNEL(THREADS, 1) tile_order(PARAMETER SweepArguments g) {
    int number = blockIdx.x * THREADS + threadIdx.x;
    if (number >= g.seqlen_q / BLOCK_Q + g.num_sequences) return;
    int sequence = -1, tile = 0;
    for (int other = 0, before = 0; other < g.num_sequences; ++other) {
        int tiles = Sequence(g, other).tiles();
        if (number >= before && number < before + tiles) sequence = other, tile = number - before;
        before += tiles;
    }
    int rank = number;
    if (sequence >= 0) {
        // Of equal work the tile of an earlier sequence goes first, and within a sequence the later tile.
        Sequence own(g, sequence);
        int work = own.work(tile);
        rank = tile ? own.tiles() - tile : 0;
        for (int other = 0; other < g.num_sequences; ++other) {
            if (other != sequence) rank += Sequence(g, other).tiles_with(work + (other > sequence));
        }
    }
    g.row_tiles[2 * rank] = sequence;
    g.row_tiles[2 * rank + 1] = tile;
}
