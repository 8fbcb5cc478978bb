// Numbers of rows where sweeps are launches of their own: in memory, and fetched where rows use them, so that they take
// no registers while keys are streamed. They are loaded and stored as those that wait within a launch, see row_state.cuh.
#pragma once
#include <row_group.cuh>

template <class T>
struct RowInMemory {
    T* base;
    const Rows& rows;

    DEVICE RowInMemory(T* base, const Rows& rows) : base(base), rows(rows) {}

    DEVICE void load(Row& to) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) to[r] = rows.exists(r) ? float(base[rows.memory_row(r)]) : 0;
    }
    DEVICE void store(const Row& from) const {
        sync_warp();  // all have read what was there
        ::store(base, from, rows);
        sync_warp();
    }
};

// One that is an argument.
struct GivenRow {
    const RowGroup& group;
    const float* from;
    float number_of_all;
    const int64_t (&strides)[3];

    DEVICE void load(Row& to) const { to = group.given(from, number_of_all, strides); }
};

// Which of the loops a group is in, from one turn to the next: it never goes back, whatever its residuals do.
struct LoopInMemory {
    int32_t* place;

    DEVICE explicit LoopInMemory(const RowGroup& group)
        : place(group.g.loop_of_group + int64_t(blockIdx.x) * ROW_GROUPS + group.number()) {}

    DEVICE int load() const { return *place; }
    DEVICE void store(int loop) const {
        if (threadIdx.x % GROUP == 0) *place = loop;
    }
};
