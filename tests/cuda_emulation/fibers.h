// Blocks of threads as fibers of one CPU thread. A fiber runs until it waits for others.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <ucontext.h>
#include <vector>

struct Index {
    int x, y, z;
};
inline Index threadIdx, blockIdx;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulator: %s (block %d %d, thread %d)\n", what, blockIdx.x, blockIdx.y, threadIdx.x);
    std::abort();
}
inline void require(bool condition, const char* what) {
    if (!condition) fail(what);
}

struct Copy {
    void* to;
    const void* from;
    int bytes;
    int group;
};

struct Fiber {
    ucontext_t start;
    jmp_buf resume;
    std::unique_ptr<char[]> stack;
    bool started = false, ended = false;
    std::vector<Copy> copies;  // that have not happened yet
    int committed = 0;         // groups of copies
};

// What a thread gives to an instruction of its whole warp, and where it wants the result.
struct Lane {
    void* out;
    uint32_t in[16];
};

struct Warp {
    Lane lanes[32];
    int arrived = 0, turn = 0;
    std::vector<std::function<void()>> products;               // that are not committed yet
    std::vector<std::vector<std::function<void()>>> committed;  // groups that have not happened yet
};

// A barrier in shared memory.
struct Phase {
    int arrivals, missing, parity;
};

struct Barrier {
    int arrived = 0, turn = 0;
};

struct Block {
    uint8_t* shared;
    uint32_t shared_bytes;
    int threads;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::map<int, Barrier> barriers;
    std::map<const void*, Phase> phases;
    jmp_buf scheduler;
    long events = 0;  // anything that another thread may wait for
    void (*body)();
};
inline Block block;

inline int current_thread() { return threadIdx.x; }
inline Fiber& fiber() { return block.fibers[threadIdx.x]; }

// Let the others run.
inline void yield() {
    if (!_setjmp(fiber().resume)) _longjmp(block.scheduler, 1);
}

template <class Condition>
inline void wait_until(Condition condition) {
    while (!condition()) yield();
}

// An instruction of all 32 threads of a warp; the last one to arrive carries it out.
template <class Action>
inline void with_warp(void* out, const uint32_t* in, int count, Action action) {
    Warp& warp = block.warps[current_thread() / 32];
    Lane& lane = warp.lanes[current_thread() % 32];
    lane.out = out;
    for (int i = 0; i < count; ++i) lane.in[i] = in[i];
    int turn = warp.turn;
    ++block.events;
    if (++warp.arrived == 32) {
        action(warp.lanes);
        warp.arrived = 0;
        ++warp.turn;
    } else {
        wait_until([&] { return warp.turn != turn; });
    }
}

inline void barrier(int name, int threads) {
    Barrier& barrier = block.barriers[name];
    int turn = barrier.turn;
    ++block.events;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.turn;
    } else {
        wait_until([&] { return barrier.turn != turn; });
    }
}

// Carry out the copies of groups before `group`.
inline void finish_copies(Fiber& fiber, int group) {
    size_t done = 0;
    for (; done < fiber.copies.size() && fiber.copies[done].group < group; ++done) {
        const Copy& copy = fiber.copies[done];
        std::memset(copy.to, 0, 16);
        std::memcpy(copy.to, copy.from, copy.bytes);
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + done);
}

inline void enter_fiber() {
    block.body();
    if (!fiber().copies.empty()) fail("a thread ends with copies that it never waited for");
    fiber().ended = true;
    ++block.events;
    _longjmp(block.scheduler, 1);
}

// Run or continue the current thread until it waits or ends.
inline void run_fiber() {
    Fiber& fiber = ::fiber();
    if (_setjmp(block.scheduler)) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

// One block. Threads take turns in order of their numbers, or backwards: what is right in one order only is a race.
inline void run_block(int threads, bool backwards) {
    constexpr size_t STACK_BYTES = 64 << 10;
    static std::vector<std::unique_ptr<char[]>> stacks;
    while (int(stacks.size()) < threads) stacks.emplace_back(new char[STACK_BYTES]);
    std::memset(block.shared, 0xff, block.shared_bytes);
    block.threads = threads;
    block.fibers = std::vector<Fiber>(threads);
    block.warps = std::vector<Warp>(threads / 32);
    block.barriers.clear();
    block.phases.clear();
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = block.fibers[i];
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = stacks[i].get();
        fiber.start.uc_stack.ss_size = STACK_BYTES;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, enter_fiber, 0);
    }
    static int ended;
    for (ended = 0; ended < threads;) {
        static long events;
        events = block.events;
        static int i;
        for (i = 0; i < threads; ++i) {
            threadIdx.x = backwards ? threads - 1 - i : i;
            if (fiber().ended) continue;
            run_fiber();
            if (fiber().ended) ++ended;
        }
        if (ended < threads && block.events == events) fail("all threads wait for each other");
    }
}
