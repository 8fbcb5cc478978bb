// Numbers of rows and vectors (rows x width) as matrix instructions spread a sum over threads: of 16 rows that a warp
// holds, a thread has rows lane / 4 and lane / 4 + 8, and of every eight columns two.
#pragma once
#include <ptx.cuh>

constexpr float LOG2_E = 1.4426950408889634f;

// A number of each of the two rows.
struct Row {
    float x[2];

    DEVICE float& operator[](int r) { return x[r]; }
    DEVICE float operator[](int r) const { return x[r]; }
};

// Number i of tile n belongs to row i / 2 and column 8 n + 2 (lane % 4) + i % 2.
template <int WIDTH>
struct Vector {
    static constexpr int TILES = WIDTH / 8;
    float x[TILES][4];

    DEVICE float operator()(int n, int i) const { return x[n][i]; }
};

template <class F>
DEVICE void assign(Row& to, F value) {
    Row made;
#pragma unroll
    for (int r = 0; r < 2; ++r) made[r] = value(r);
    to = made;
}

template <int WIDTH, class F>
DEVICE void assign(Vector<WIDTH>& to, F value) {
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) to.x[n][i] = value(n, i);
    }
}

// Four neighbouring threads share a row.
DEVICE float sum_of_row(float x) {
    x += from_lane_xor(x, 1);
    return x + from_lane_xor(x, 2);
}
DEVICE float maximum_of_row(float x) {
    x = fmaxf(x, from_lane_xor(x, 1));
    return fmaxf(x, from_lane_xor(x, 2));
}

// Sums over the columns of what `product` gives for every element.
template <int WIDTH, class F>
DEVICE Row sum_of_rows(F product) {
    Row sums = {};
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i / 2] += product(n, i);
    }
    return {sum_of_row(sums[0]), sum_of_row(sums[1])};
}

// Write numbers of rows, if there is a place for them.
template <class T, class Rows>
DEVICE void store(T* to, const Row& value, const Rows& rows) {
    if (!to || rows.lane() % 4) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (rows.exists(r)) to[rows.memory_row(r)] = T(value[r]);
    }
}

// A result in the input type, rows of COLUMNS numbers `stride` apart.
template <int COLUMNS, int WIDTH, class Rows>
DEVICE void store_result(uint16_t* to, int64_t stride, const Vector<WIDTH>& value, const Rows& rows) {
    if (!to) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (!rows.exists(r)) continue;
        uint16_t* start = to + rows.number(r) * stride + rows.column(0);
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n) {
            uint32_t pair = pack(value.x[n][2 * r], value.x[n][2 * r + 1]);
            int left = COLUMNS - rows.column(n);
            if (COLUMNS % 2 == 0) {
                if (left > 0) *reinterpret_cast<uint32_t*>(start + 8 * n) = pair;
            } else {
                if (left > 0) start[8 * n] = uint16_t(pair);
                if (left > 1) start[8 * n + 1] = uint16_t(pair >> 16);
            }
        }
    }
}
