// The table of row numbers that sweeps read: the rows of a head, or those of its packed sequences one after another.
#pragma once
#include <sweep_arguments.cuh>

// Where the rows of a packed sequence begin. Every sequence has whole tiles, so that the rows behind its last one are
// nobody's; where it begins follows from its own start alone.
DEVICE int table_start_of(const SweepArguments& g, int sequence) {
    return (g.cu_seqlens_q[sequence] / TABLE_TILE + sequence) * TABLE_TILE;
}

// Where a number of a row is: of two rows next to each other lie both first numbers, both second ones, and so on.
template <int COUNT>
DEVICE int64_t number_at(int64_t row, int number) {
    return (row / 2 * COUNT + number) * 2 + row % 2;
}
