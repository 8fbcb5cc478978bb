// What streams of wgmma products share: where their operands are, and which registers wait for them.
#pragma once
#include <ptx_sm90.cuh>

// Which stage the next tile has, and how often the stages have been gone through.
struct Turn {
    int stage = 0, parity = 0;

    DEVICE void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    DEVICE Turn following() const {
        Turn turn = *this;
        turn.next();
        return turn;
    }
    DEVICE Turn before() const { return stage ? Turn{stage - 1, parity} : Turn{STAGES - 1, parity ^ 1}; }
};

template <int COUNT>
DEVICE void hold_all(float (&x)[COUNT][4]) {
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) hold(x[n][i]);
    }
}

template <int COUNT>
DEVICE void hold_all(uint32_t (&x)[COUNT][4]) {
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) hold(x[n][i]);
    }
}

// Rows that lie as tiles do in panels of 64 columns, as an operand of products with other rows; of it, the 16 columns of
// a step are so much further.
DEVICE uint64_t describe_rows(uint32_t tile) { return describe_operand(tile, 128, 0); }
DEVICE uint32_t columns_of_step(int step, int panel_bytes) { return step / 4 * (panel_bytes >> 4) + step % 4 * 2; }
// A descriptor of what lies so many units of 16 bytes behind; addresses do not carry into its other fields.
DEVICE uint64_t further(uint64_t descriptor, uint32_t units) {
    return descriptor & 0xffffffff00000000ull | uint32_t(uint32_t(descriptor) + units);
}
