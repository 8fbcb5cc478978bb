// In which order the blocks of a backward pass take packed sequences: for query rows and for keys a table of (sequence,
// tile) by rank, worked out on the device, since the host never sees the lengths. Tiles that see most go first, so that
// short ones fill the tail. Ranks beyond the last tile have sequence -1.
#include <sweep_arguments.cuh>

constexpr int THREADS = 128;

struct Shared {};

// One side of a sequence, in tiles that its blocks hold; places count them from the one that sees most on.
template <bool KEYS>
struct Side {
    static constexpr int HELD = KEYS ? BLOCK_KEYS : BLOCK_ROWS;
    int held, streamed;

    DEVICE Side(const SweepArguments& g, int sequence) {
        int queries = g.cu_seqlens_q[sequence + 1] - g.cu_seqlens_q[sequence];
        int keys = g.cu_seqlens_k[sequence + 1] - g.cu_seqlens_k[sequence];
        held = KEYS ? keys : queries, streamed = KEYS ? queries : keys;
    }

    DEVICE static int most_tiles(const SweepArguments& g) {
        return (KEYS ? g.seqlen_k : g.seqlen_q) / HELD + g.num_sequences;
    }
    DEVICE int tiles() const { return (held + HELD - 1) / HELD; }
    // The last causal rows see most, and the first keys are seen most.
    DEVICE int tile(int place) const { return CAUSAL && !KEYS ? tiles() - 1 - place : place; }

    // Of the streamed side, how many some of the tile see: with every place HELD fewer than `seen`.
    DEVICE int seen() const { return KEYS ? held : streamed + tiles() * HELD - held; }
    DEVICE int work(int place) const { return CAUSAL ? max(min(streamed, seen() - place * HELD), 0) : streamed; }
    // How many tiles have so much work or more.
    DEVICE int tiles_with(int least) const {
        if (!CAUSAL || least <= 0) return streamed >= least ? tiles() : 0;
        return min(streamed, seen()) >= least ? min((seen() - least) / HELD + 1, tiles()) : 0;
    }
};

template <bool KEYS>
DEVICE void rank_tile(const SweepArguments& g, int number, int32_t* table) {
    if (number >= Side<KEYS>::most_tiles(g)) return;
    int sequence = -1, place = 0;
    for (int other = 0, before = 0; other < g.num_sequences; ++other) {
        int tiles = Side<KEYS>(g, other).tiles();
        if (number >= before && number < before + tiles) sequence = other, place = number - before;
        before += tiles;
    }
    int rank = number, tile = 0;
    if (sequence >= 0) {
        // Of equal work the tile of an earlier sequence goes first, and within a sequence the earlier place.
        Side<KEYS> own(g, sequence);
        int work = own.work(place);
        tile = own.tile(place), rank = place;
        for (int other = 0; other < g.num_sequences; ++other) {
            if (other != sequence) rank += Side<KEYS>(g, other).tiles_with(work + (other > sequence));
        }
    }
    table[2 * rank] = sequence;
    table[2 * rank + 1] = tile;
}

KERNEL(THREADS, 1) backward_order(PARAMETER SweepArguments g) {
    int row_blocks = (Side<false>::most_tiles(g) + THREADS - 1) / THREADS, block = blockIdx.x;
    if (block < row_blocks) {
        rank_tile<false>(g, block * THREADS + threadIdx.x, g.row_tiles);
    } else {
        rank_tile<true>(g, (block - row_blocks) * THREADS + threadIdx.x, g.key_tiles);
    }
}
