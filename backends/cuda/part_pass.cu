// One pass over the keys of a part, for operators of one sweep, with the matrix instructions of one warp (mma.sync),
// for compute capability 8.0 on.
//
// A warp has 8 rows of a group, which share their keys, and takes BLOCK_K keys of every tile, with maxima, means and
// sums of its own: warps meet when all keys have been read. The ROW_WARPS warps of the same keys copy them into a ring
// of stages that no other warp reads; where it is one warp, nothing in the loop waits for another.
#include <part_copy.cuh>
#include <part_products.cuh>

constexpr int STAGE_BYTES = KeyTile::BYTES + ValueTile::BYTES;
constexpr int COPIERS = 32 * ROW_WARPS;  // threads that share a ring

struct Shared {
    union {
        uint8_t stages[KEY_WARPS][STAGES][STAGE_BYTES];
        float sums[KEY_WARPS][BLOCK_Q][PART];
    };
};

// The stages of the warps that share keys, filled as far ahead as there are stages.
struct Ring {
    PartCopy<COPIERS> copies;
    Slots slots;  // that are copied next
    uint32_t stages;
    int left;  // tiles to copy
    int to = 0, from = 0;

    DEVICE Ring(const PartArguments& g, const PartTile& tile, int first_key, uint32_t stages)
        : copies(tile.cache(g, g.k, g.k_strides), tile.cache(g, g.v, g.v_strides), threadIdx.x % COPIERS),
          slots{first_key, tile.first_seen, tile.stop, tile.table(g)}, stages(stages), left(tile.tiles()) {
        copies.find_pages(slots);
#pragma unroll 1
        for (int i = 0; i < STAGES - 1; ++i) copy();
    }

    DEVICE static int after(int stage) { return stage + 1 == STAGES ? 0 : stage + 1; }

    DEVICE void copy() {
        if (left > 0) {
            copies.start(stages + to * STAGE_BYTES, slots, threadIdx.x % COPIERS);
            slots.first += TILE;
            copies.find_pages(slots);
        }
        commit_copies();
        --left, to = after(to);
    }

    DEVICE static void sync() {
        if constexpr (ROW_WARPS == 1) {
            sync_warp();
        } else {
            sync_block();
        }
    }

    // The stage of the next tile, which is there for all that share it; the stage of the one before is filled anew.
    DEVICE uint32_t next() {
        wait_copies<STAGES - 2>();
        sync();
        copy();
        uint32_t found = stages + from * STAGE_BYTES;
        from = after(from);
        return found;
    }
};

// Scores of keys that a row does not see become -inf; others become exponents.
DEVICE void scale_and_mask(float (&s)[BLOCK_K / 8][4], float scale_log2, bool cuts, int start, int stop) {
#pragma unroll
    for (int n = 0; n < BLOCK_K / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int key = 8 * n + i;
            s[n][i] *= scale_log2;
            if (cuts && (key < start || key >= stop)) s[n][i] = -INFINITE;
        }
    }
}

KERNEL(THREADS, BLOCKS) part_pass(PARAMETER PartArguments g) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    int thread = threadIdx.x, warp = uniform(thread / 32), lane = thread % 32;
    int row_warp = warp % ROW_WARPS, key_warp = warp / ROW_WARPS;
    const PartTile tile(g, blockIdx.x);
    int tiles = tile.tiles(), first_key = tile.start + key_warp * BLOCK_K;

    Ring ring(g, tile, first_key, shared_address(shared.stages[key_warp]));
    int row = tile.first_row + row_warp * ROWS + lane / 4, token = row % g.seqlen_q;
    const RowOperands rows(g, tile, row, lane);
    float scale_log2 = (g.scale_pointer ? *g.scale_pointer : g.scale) * LOG2_E;
    int row_start = tile.first_key(g, token), row_stop = tile.key_stop(g, token);
    PartSoftmax softmax;
    SumTiles sums = {};
#pragma unroll 1
    for (int at = 0; at < tiles; ++at) {
        uint32_t stage = ring.next();
        float s[BLOCK_K / 8][4];
        multiply_keys(s, rows, stage, lane);
        int first = first_key + at * TILE, own = first + 2 * (lane % 4);
        scale_and_mask(s, scale_log2, tile.cuts(first), row_start - own, row_stop - own);
        add_values(sums, softmax.weigh(s, sums), stage + KeyTile::BYTES, lane);
    }
    wait_copies<0>();
    softmax.end(sums);
    sync_block();  // nobody reads keys any more
    store_sums(shared.sums[key_warp][row_warp * ROWS], sums, softmax, lane);
    sync_block();

    int existing = min(tile.rows - tile.first_row, BLOCK_Q);
    for (int at = thread; at < existing * BLOCK_DV; at += THREADS) {
        int local = at / BLOCK_DV, column = at % BLOCK_DV, number = tile.first_row + local;
        Sums all = merge_column(shared.sums[0][local], BLOCK_Q * PART, KEY_WARPS, column);
        if (g.num_splits == 1) {
            store_output(g, tile.kv, number, column, all);
        } else {
            int64_t part = (int64_t(tile.kv) * tile.rows + number) * g.num_splits + tile.split;
            store_column(g.parts + part * PART, column, all);
        }
    }
}
