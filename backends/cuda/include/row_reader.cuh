// Numbers of query rows from their vectors: a few threads next to each other share a row, and each has eight columns.
#pragma once
#include <row_table.cuh>
#include <sweep_arguments.cuh>
#include <tile.cuh>
#include <vector.cuh>

constexpr int THREADS = 256;
constexpr int LANES = (BLOCK_D > BLOCK_DV ? BLOCK_D : BLOCK_DV) / CHUNK;

struct Chunk {
    float x[CHUNK];
};

struct RowReader {
    const SweepArguments& g;
    int64_t batch, head;
    int64_t table_row;
    int number;   // of the row in its head
    int column;   // the first of the thread's
    bool exists;  // the table has rows beyond the last query of a sequence

    DEVICE explicit RowReader(const SweepArguments& g) : g(g) {
        table_row = int64_t(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
        int64_t index = table_row / g.table_rows;
        number = table_row % g.table_rows, column = threadIdx.x % LANES * CHUNK;
        batch = index / g.num_heads, head = index % g.num_heads;
        int stop = g.seqlen_q;
        if (PACKED) {
            int sequence = sequence_at(number);
            number += g.cu_seqlens_q[sequence] - table_start_of(g, sequence);
            stop = g.cu_seqlens_q[sequence + 1];
        }
        exists = index < g.batch_heads && number < stop;
    }

    // The packed sequence that a row of the table is of: the last one that begins before it.
    DEVICE int sequence_at(int row) const {
        int sequence = 0;
        for (int stop = g.num_sequences; stop - sequence > 1;) {
            int middle = (sequence + stop) / 2;
            if (table_start_of(g, middle) <= row) {
                sequence = middle;
            } else {
                stop = middle;
            }
        }
        return sequence;
    }

    DEVICE int64_t memory_row() const { return (batch * g.num_heads + head) * g.seqlen_q + number; }

    // Of an input of WIDTH columns; zeros beyond them.
    template <int WIDTH>
    DEVICE Chunk input(const uint16_t* base, const int64_t (&strides)[3]) const {
        const uint16_t* from = base + batch * strides[0] + head * strides[1] + number * strides[2] + column;
        int left = exists ? WIDTH - column : 0;
        Chunk made;
        if (ALIGNED && WIDTH % CHUNK == 0) {
            struct alignas(16) Words {
                uint32_t x[CHUNK / 2];
            } words = {};
            if (left > 0) words = *reinterpret_cast<const Words*>(from);
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) made.x[i] = i % 2 ? high_half(words.x[i / 2]) : low_half(words.x[i / 2]);
        } else {
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) made.x[i] = i < left ? low_half(from[i]) : 0;
        }
        return made;
    }

    // Of what another pass has left, dense and in float32.
    template <int WIDTH>
    DEVICE Chunk state(const float* base) const {
        const float* from = base + memory_row() * WIDTH + column;
        int left = exists ? WIDTH - column : 0;
        Chunk made = {};
        if (WIDTH % CHUNK == 0) {
            struct alignas(16) Words {
                float x[CHUNK / 2];
            };
            if (left > 0) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    Words words = *reinterpret_cast<const Words*>(from + half * (CHUNK / 2));
#pragma unroll
                    for (int i = 0; i < CHUNK / 2; ++i) made.x[half * (CHUNK / 2) + i] = words.x[i];
                }
            }
        } else {
#pragma unroll
            for (int i = 0; i < CHUNK; ++i) made.x[i] = i < left ? from[i] : 0;
        }
        return made;
    }
    DEVICE float number_of(const float* base, float of_none) const { return exists ? base[memory_row()] : of_none; }

    DEVICE static float dot(const Chunk& x, const Chunk& y) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) sum += x.x[i] * y.x[i];
#pragma unroll
        for (int lanes = 1; lanes < LANES; lanes *= 2) sum += from_lane_xor(sum, lanes);
        return sum;
    }

    template <int COUNT>
    DEVICE void store(const float (&numbers)[COUNT]) const {
        if (column || table_row >= int64_t(g.batch_heads) * g.table_rows) return;
#pragma unroll
        for (int k = 0; k < COUNT; ++k) g.table[number_at<COUNT>(table_row, k)] = numbers[k];
    }
};
