// Where the operands of a sweep lie in shared memory, both sides in panels of 64 columns.
#pragma once
#include <tile.cuh>

constexpr int GROUP_ROWS = 64;

// 64 of the held side, `OFFSET` bytes behind the first of the group's operands.
template <class T, int OFFSET_>
struct Held {
    static constexpr int WIDTH = T::WIDTH, BLOCK_WIDTH = T::BLOCK_WIDTH, OFFSET = OFFSET_;
    static constexpr int PANEL_BYTES = GROUP_ROWS * 128;
    static constexpr int END = OFFSET + BLOCK_WIDTH / 64 * PANEL_BYTES;

    DEVICE static uint32_t offset(int row, int chunk) {
        return chunk / 8 * PANEL_BYTES + row * 128 + (chunk % 8 ^ row % 8) * 16;
    }
};

// A tile of the streamed side in a stage.
template <class T, int OFFSET_>
struct Streamed {
    using Tile = T;
    static constexpr int OFFSET = OFFSET_, END = OFFSET + T::BYTES;
};
