// The table of row numbers that sweeps read.
#pragma once
#include <ptx.cuh>

// Where a number of a row is: of two rows next to each other lie both first numbers, both second ones, and so on.
template <int COUNT>
DEVICE int64_t number_at(int64_t row, int number) {
    return (row / 2 * COUNT + number) * 2 + row % 2;
}
