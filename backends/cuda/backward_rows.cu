// The numbers of query rows that the sweeps of a backward pass read, as one table.
#include <row_reader.cuh>
#include <numbers.cuh>

struct Shared {};

KERNEL(THREADS, 1) backward_rows(PARAMETER SweepArguments g) {
    RowReader row(g);
    store_numbers(row);
}
