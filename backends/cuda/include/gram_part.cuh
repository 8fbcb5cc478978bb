// What the kernels that sum a part have in common: which keys it has, their weights, and the operands made of them.
#pragma once
#include <gram_arguments.cuh>
#include <tile.cuh>

constexpr float LOG2_E = 1.4426950408889634f;

// One part of one query; the queries of a group follow each other, to share the keys in the L2 cache.
struct Part {
    int64_t batch, head, row;
    int first_seen, seen_stop;  // the keys that the query sees
    int first_tile;             // where the tiles of the query begin
    int start, stop;            // the keys of this part: whole tiles, but for the last one
    float* state;
    Cache keys, values;
    const int32_t* table;  // of pages

    DEVICE Part(const GramArguments& g, int index) {
        int mates = g.group_size * g.seqlen_q, mate = 0, group = 0;
        if (mates > 1) {
            mate = index % mates, index /= mates;
            group = mate / g.seqlen_q;
        }
        row = mate - group * g.seqlen_q;
        int kv = index / g.num_splits, split = index - kv * g.num_splits;
        batch = kv / g.num_kv_heads;
        int kv_head = kv - int(batch) * g.num_kv_heads;
        head = kv_head * g.group_size + group;

        int length = g.capacity;
        if (g.seqlens) length = min(max(g.seqlens[batch], 0), g.capacity);
        seen_stop = max(length - (g.seqlen_q - 1 - int(row)), 0);
        first_seen = g.window ? max(seen_stop - g.window, 0) : 0;
        int tile = first_seen / BLOCK_K;
        int tiles = ((seen_stop + BLOCK_K - 1) / BLOCK_K - tile + g.num_splits - 1) / g.num_splits;
        first_tile = tile * BLOCK_K;
        start = first_tile + split * tiles * BLOCK_K;
        stop = min(start + tiles * BLOCK_K, seen_stop);

        int64_t query = (batch * g.num_kv_heads * g.group_size + head) * g.seqlen_q + row;
        state = g.state + (query * g.num_splits + split) * PART;
        int64_t page_batch = PAGE_SIZE ? 0 : batch;
        table = PAGE_SIZE ? g.block_table + batch * g.table_stride : nullptr;
        keys = {g.k + page_batch * g.k_strides[0] + kv_head * g.k_strides[1], g.k_strides[0], g.k_strides[2]};
        values = {g.v + page_batch * g.v_strides[0] + kv_head * g.v_strides[1], g.v_strides[0], g.v_strides[2]};
    }

    // Of a tile of this part.
    DEVICE Slots slots(int tile) const { return {start + tile * BLOCK_K, first_seen, stop, table}; }

    DEVICE bool sees(int key) const { return key >= first_seen && key < stop; }
    DEVICE bool empty() const { return start >= stop; }
    DEVICE int tiles() const { return (stop - start + BLOCK_K - 1) / BLOCK_K; }
    DEVICE bool in_two_terms() const { return TERMS == 2 && seen_stop - first_seen <= TWO_TERMS_UP_TO; }
};

// The query's elements, zero beyond HEAD_DIM, for dot_products.
DEVICE void load_query(uint16_t* query, const GramArguments& g, const Part& part, int thread, int threads) {
    const uint16_t* from = g.q + part.batch * g.q_strides[0] + part.head * g.q_strides[1] + part.row * g.q_strides[2];
    for (int d = thread; d < BLOCK_D; d += threads) query[d] = d < HEAD_DIM ? from[d] : 0;
}

// q.k of sixteen keys of a tile: of first + lane / 4 and of first + lane / 4 + 8. The operands are exact, and all
// columns of the right one are the query.
DEVICE void dot_products(float (&dots)[2], uint32_t key_tile, int first, const uint16_t* query, int lane) {
    float sum[2][4] = {};  // of even and of odd steps: half as long a chain
    const uint32_t* pairs = reinterpret_cast<const uint32_t*>(query);
#pragma unroll
    for (int step = 0; step < BLOCK_D / 16; ++step) {
        uint32_t a[4];
        load_matrices(a, key_tile + KeyTile::offset(first + lane % 16, 2 * step ^ lane / 16));
        multiply_add(sum[step % 2], a, pairs[8 * step + lane % 4], pairs[8 * step + lane % 4 + 4]);
    }
    dots[0] = sum[0][0] + sum[1][0];
    dots[1] = sum[0][2] + sum[1][2];
}

constexpr int MAX_WARPS = 16;

// Shared memory of a block beside its tiles.
struct Scratch {
    uint16_t query[BLOCK_D];
    float shift[BLOCK_D];
    float largest[MAX_WARPS], sums[MAX_WARPS];  // of each warp
    float factor, reference;  // of scores and weights, see Weights
};

// Weights of the keys of a part relative to a reference that stays, and what one thread knows of their sum and of the
// largest score: a maximum over all warps for every tile would hold them up.
struct Weights {
    float factor, reference;  // scores are in units of log 2
    float largest = -INFINITE;
    float sum = 0;

    DEVICE explicit Weights(const Scratch& scratch) : factor(scratch.factor), reference(scratch.reference) {}

    // The weight of a key by its product with the query; `counts` for one of the threads that have it.
    DEVICE float weigh(float dot, bool seen, bool counts) {
        float score = seen ? dot * factor : -INFINITE;
        float weight = exp2_of(score - reference);
        largest = fmaxf(largest, score);
        if (counts) sum += weight;
        return weight;
    }
};

// The weights that one thread meets in the operands of sixteen keys: of the keys 2t, 2t + 1, 2t + 8 and 2t + 9.
struct FourWeights {
    float2 first, second;

    DEVICE FourWeights(const float* weights, int lane)
        : first(reinterpret_cast<const float2*>(weights)[lane % 4]),
          second(reinterpret_cast<const float2*>(weights)[lane % 4 + 4]) {}

    // The narrow right operand that sums values: its column 0 is the weights, column 1 what rounding them lost.
    DEVICE void as_columns(uint32_t (&b)[2], int lane) const {
        uint32_t high[2] = {pack(first.x, first.y), pack(second.x, second.y)};
        uint32_t low[2] = {pack(first.x - low_half(high[0]), first.y - high_half(high[0])),
                           pack(second.x - low_half(high[1]), second.y - high_half(high[1]))};
#pragma unroll
        for (int i = 0; i < 2; ++i) b[i] = lane / 4 == 0 ? high[i] : lane / 4 == 1 ? low[i] : 0;
    }
};

DEVICE float warp_max(float x) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) x = fmaxf(x, from_lane_xor(x, mask));
    return x;
}

DEVICE float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) x += from_lane_xor(x, mask);
    return x;
}

// Of what the warps have left in `scratch`, after they have met.
template <int WARPS>
DEVICE float largest_of_block(const Scratch& scratch) {
    static_assert(WARPS <= MAX_WARPS);
    float largest = scratch.largest[0];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) largest = fmaxf(largest, scratch.largest[warp]);
    return largest;
}

// Called by WARPS warps before the first pass over the keys. The query's first tile gives the reference of its weights,
// its largest score, and the mean that is taken off all keys before they are weighted, so that an offset that keys
// share is not rounded. `meet()` returns once all these threads have called it. Fills `scratch`, for all threads that
// meet the first one afterwards; `key_tile` is free again then.
template <int WARPS, class Meet>
DEVICE void prepare(const GramArguments& g, const Part& part, uint8_t* key_tile, Scratch& scratch, int thread,
                    Meet meet) {
    constexpr int THREADS = 32 * WARPS;
    uint32_t tile = shared_address(key_tile);
    copy_keys<THREADS>(tile, part.keys, {part.first_tile, part.first_seen, part.seen_stop, part.table}, thread);
    commit_copies();
    load_query(scratch.query, g, part, thread, THREADS);
    float factor = (g.scale_pointer ? *g.scale_pointer : g.scale) * LOG2_E;
    wait_copies<0>();
    meet();
    int tile_stop = min(part.first_tile + BLOCK_K, part.seen_stop);
    float largest = -INFINITE;
    for (int first = thread / 32 * 16; first < BLOCK_K; first += 16 * WARPS) {
        float dots[2];
        dot_products(dots, tile, first, scratch.query, thread % 32);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int key = part.first_tile + first + thread % 32 / 4 + 8 * i;
            if (key >= part.first_seen && key < tile_stop) largest = fmaxf(largest, dots[i] * factor);
        }
    }
    // The last threads first: the first warps have the products.
    for (int d = THREADS - 1 - thread; d < BLOCK_D; d += THREADS) {
        float sum = 0;
#pragma unroll 16
        for (int key = 0; key < BLOCK_K; ++key) {
            const uint8_t* chunk = key_tile + KeyTile::offset(key, d / CHUNK);
            sum += low_half(reinterpret_cast<const uint16_t*>(chunk)[d % CHUNK]);
        }
        float shift = sum / float(tile_stop - part.first_seen);
        scratch.shift[d] = shift;
        part.state[SHIFT_AT + d] = shift;
    }
    largest = warp_max(largest);
    if (thread % 32 == 0) scratch.largest[thread / 32] = largest;
    meet();
    if (thread == 0) scratch.factor = factor, scratch.reference = largest_of_block<WARPS>(scratch);
}

// After a pass over the keys, three steps between which the threads meet. The warps that weigh leave what they know;
DEVICE void leave(Scratch& scratch, const Weights& weights, int warp, int lane) {
    float largest = warp_max(weights.largest), sum = warp_sum(weights.sum);
    if (lane == 0) scratch.largest[warp] = largest, scratch.sums[warp] = sum;
}
// then all threads know the largest score, and whether the reference was too low: another pass has to be made;
template <int WARPS>
DEVICE bool too_low(const Scratch& scratch, float reference) {
    return largest_of_block<WARPS>(scratch) > reference + HEADROOM;
}
// one thread stores the sum of the weights, and gives a next pass its reference, before which they meet once more.
template <int WARPS>
DEVICE void conclude(Scratch& scratch, const Part& part, float reference) {
    float omega = 0;
    for (int warp = 0; warp < WARPS; ++warp) omega += scratch.sums[warp];
    part.state[0] = reference;
    part.state[1] = omega;
    if (too_low<WARPS>(scratch, reference)) scratch.reference = largest_of_block<WARPS>(scratch);
}

// Where a lane points load_matrices_transposed for 16 keys x 16 columns of a tile as a left operand of 16 rows.
template <class T>
DEVICE uint32_t left_operand(int key, int column, int lane) {
    return T::offset(key + lane / 16 * 8 + lane % 8, column / CHUNK ^ lane / 8 % 2);
}
// The same as two right operands of 8 columns: {0, 1} and {2, 3}.
template <class T>
DEVICE uint32_t right_operands(int key, int column, int lane) {
    return T::offset(key + lane / 8 % 2 * 8 + lane % 8, column / CHUNK ^ lane / 16);
}

// Sixteen keys x sixteen rows as left operands: weighted keys less the shift, rounded, and what that lost as a second
// term. `shift` has the rows lane / 4 and lane / 4 + 8.
template <int COUNT>
DEVICE void weigh_keys(uint32_t (&terms)[COUNT][4], uint32_t address, const FourWeights& weights,
                       const float (&shift)[2]) {
    uint32_t raw[4];
    load_matrices_transposed(raw, address);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 weight = i < 2 ? weights.first : weights.second;
        float low = (low_half(raw[i]) - shift[i % 2]) * weight.x;
        float high = (high_half(raw[i]) - shift[i % 2]) * weight.y;
        terms[0][i] = pack(low, high);
        if (COUNT == 2) terms[COUNT - 1][i] = pack(low - low_half(terms[0][i]), high - high_half(terms[0][i]));
    }
}

// The thread's share of sixteen rows of sums, row and row + 8, to a matrix of WIDTH columns. Of two neighbouring tiles
// of eight a thread has two columns each, and two threads swap, so that each stores four columns of one.
template <int WIDTH, int TILES>
DEVICE void store_rows(float* matrix, const float (&sums)[TILES][4], int row, int lane) {
    bool odd = lane % 2;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n += 2) {
        float* to = matrix + row * WIDTH + 8 * (n + odd) + 2 * (lane % 4 - odd);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float2 first = {sums[n][2 * half], sums[n][2 * half + 1]};
            float2 second = {sums[n + 1][2 * half], sums[n + 1][2 * half + 1]};
            float2 other = {from_lane_xor(odd ? first.x : second.x, 1), from_lane_xor(odd ? first.y : second.y, 1)};
            *reinterpret_cast<float4*>(to + 8 * half * WIDTH) =
                odd ? float4{other.x, other.y, second.x, second.y} : float4{first.x, first.y, other.x, other.y};
        }
    }
}
