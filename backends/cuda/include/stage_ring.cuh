// What the groups of a block and the warps that copy for them share: operands that are held, and a ring of stages, each
// with a tile of the other side and the numbers of rows among it.
#pragma once
#include <held_block.cuh>
#include <operands.cuh>
#include <row_table.cuh>

constexpr int GROUP = 2 * GROUP_ROWS;  // threads
constexpr int ROW_GROUPS = HELD_ROWS / GROUP_ROWS;
constexpr int THREADS = GROUP * (ROW_GROUPS + 1);
constexpr int STEPS = BLOCK_K / 16;
// Of a stage that is no longer needed: one for every warp, or all lanes that have read numbers of rows from it.
constexpr int RELEASES = ROW_GROUPS * (HOLDS_KEYS ? GROUP : GROUP / 32);
// Of a multiprocessor's 65536 registers, in eights for each thread.
constexpr int COPY_REGISTERS = ROW_GROUPS == 3 ? 32 : 24;
constexpr int ROW_REGISTERS = ROW_GROUPS == 3 ? 160 : BLOCKS == 2 ? 232 : 240;
constexpr int NUMBERS_OF_TILE = HOLDS_KEYS ? BLOCK_K * NUMBERS : 4;

struct Shared {
    uint8_t stages[STAGES][STAGE_BYTES];
    uint8_t held[ROW_GROUPS][HELD_BYTES];
    alignas(16) float numbers[STAGES][NUMBERS_OF_TILE];
    uint64_t full[STAGES], empty[STAGES];
    HeldBlock block;
};
