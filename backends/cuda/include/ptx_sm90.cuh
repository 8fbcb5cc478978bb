// The instructions of compute capability 9.0 alone, as ptx.cuh has the others.
#pragma once
#include <ptx.cuh>

#if BFLOAT16
#define OPERANDS "bf16.bf16"
#else
#define OPERANDS "f16.f16"
#endif
#define SUM_OF_TILE(i) "+f"(sum[i][0]), "+f"(sum[i][1]), "+f"(sum[i][2]), "+f"(sum[i][3])

// ---- barriers in shared memory: threads arrive, others wait for the phase to end ----

DEVICE void init_barrier(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
DEVICE void arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Wait for the end of the phase of this parity; the phase before the first one has parity 1 and has ended.
DEVICE void wait_phase(uint64_t* barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared.b64 ended, [%0], %1;\n"
        "@!ended bra again;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// A barrier of some warps of the block; 0 is the block's own.
template <int NAME, int THREADS>
DEVICE void sync_some() {
    asm volatile("bar.sync %0, %1;" ::"n"(NAME), "n"(THREADS) : "memory");
}

// ---- registers move between groups of four warps ----

template <int REGISTERS>
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- matrix products of four warps, which run on their own ----

// A right operand that is transposed in shared memory: its 16 rows are those of a tile, in panels of `row_bytes`.
DEVICE uint64_t describe_operand(uint32_t address, int row_bytes, int panel_bytes) {
    uint64_t mode = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
    return uint64_t(address >> 4 & 0x3fff) | uint64_t(panel_bytes >> 4) << 16 | uint64_t(row_bytes * 8 >> 4) << 32 |
           mode << 62;
}

// What other threads wrote, and this one has waited for, as the products will read it.
DEVICE void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Before the first product, and whenever registers of products have been written.
DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
DEVICE void wait_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
// Registers that products under way read or write stay where they are until here.
DEVICE void hold(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
DEVICE void hold(float& x) { asm volatile("" : "+f"(x)::"memory"); }

// sum += a b: 64 x 8 TILES += (64 x 16) (16 x 8 TILES); every warp has sixteen rows of a and of the sum.
DEVICE void multiply_group(float (&sum)[1][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32." OPERANDS " "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, 1, 1, 1, 1;"
            : SUM_OF_TILE(0)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void multiply_group(float (&sum)[2][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k16.f32." OPERANDS " "
            "{%0, %1, %2, %3, %4, %5, %6, %7}, "
            "{%8, %9, %10, %11}, %12, 1, 1, 1, 1;"
            : SUM_OF_TILE(0), SUM_OF_TILE(1)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void multiply_group(float (&sum)[4][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." OPERANDS " "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
            "{%16, %17, %18, %19}, %20, 1, 1, 1, 1;"
            : SUM_OF_TILE(0), SUM_OF_TILE(1), SUM_OF_TILE(2), SUM_OF_TILE(3)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void multiply_group(float (&sum)[8][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." OPERANDS " "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21,"
            " %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
            "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
            : SUM_OF_TILE(0), SUM_OF_TILE(1), SUM_OF_TILE(2), SUM_OF_TILE(3), SUM_OF_TILE(4), SUM_OF_TILE(5),
              SUM_OF_TILE(6), SUM_OF_TILE(7)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void multiply_group(float (&sum)[16][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." OPERANDS " "
            "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21,"
            " %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41,"
            " %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61,"
            " %62, %63}, "
            "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
            : SUM_OF_TILE(0), SUM_OF_TILE(1), SUM_OF_TILE(2), SUM_OF_TILE(3), SUM_OF_TILE(4), SUM_OF_TILE(5),
              SUM_OF_TILE(6), SUM_OF_TILE(7), SUM_OF_TILE(8), SUM_OF_TILE(9), SUM_OF_TILE(10), SUM_OF_TILE(11),
              SUM_OF_TILE(12), SUM_OF_TILE(13), SUM_OF_TILE(14), SUM_OF_TILE(15)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// ---- products of the rows of two tiles ----
// sum = a b^T, or with ADD sum += a b^T: 64 x 8 TILES of (64 x 16) (8 TILES x 16)^T. Both operands lie row by row in
// panels of 64 columns, see describe_operand; `a` may be in registers instead.

template <int ADD>
DEVICE void multiply_shared(float (&sum)[4][4], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." OPERANDS " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
        "}, %16, %17, %18, 1, 1, 0, 0;"
        : SUM_OF_TILE(0), SUM_OF_TILE(1), SUM_OF_TILE(2), SUM_OF_TILE(3)
        : "l"(a), "l"(b), "n"(ADD));
}
template <int ADD>
DEVICE void multiply_rows(float (&sum)[4][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." OPERANDS " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
        "}, {%16, %17, %18, %19}, %20, %21, 1, 1, 0;"
        : SUM_OF_TILE(0), SUM_OF_TILE(1), SUM_OF_TILE(2), SUM_OF_TILE(3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD));
}
template <int ADD>
DEVICE void multiply_shared(float (&sum)[8][4], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." OPERANDS " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, %32, %33, %34, 1, 1, 0, 0;"
        : SUM_OF_TILE(0), SUM_OF_TILE(1), SUM_OF_TILE(2), SUM_OF_TILE(3), SUM_OF_TILE(4),
          SUM_OF_TILE(5), SUM_OF_TILE(6), SUM_OF_TILE(7)
        : "l"(a), "l"(b), "n"(ADD));
}
template <int ADD>
DEVICE void multiply_rows(float (&sum)[8][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." OPERANDS " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, %37, 1, 1, 0;"
        : SUM_OF_TILE(0), SUM_OF_TILE(1), SUM_OF_TILE(2), SUM_OF_TILE(3), SUM_OF_TILE(4),
          SUM_OF_TILE(5), SUM_OF_TILE(6), SUM_OF_TILE(7)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD));
}
template <int ADD>
DEVICE void multiply_shared(float (&sum)[12][4], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n96k16.f32." OPERANDS " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
        "}, %48, %49, %50, 1, 1, 0, 0;"
        : SUM_OF_TILE(0), SUM_OF_TILE(1), SUM_OF_TILE(2), SUM_OF_TILE(3), SUM_OF_TILE(4),
          SUM_OF_TILE(5), SUM_OF_TILE(6), SUM_OF_TILE(7), SUM_OF_TILE(8), SUM_OF_TILE(9),
          SUM_OF_TILE(10), SUM_OF_TILE(11)
        : "l"(a), "l"(b), "n"(ADD));
}
template <int ADD>
DEVICE void multiply_rows(float (&sum)[12][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n96k16.f32." OPERANDS " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
        "}, {%48, %49, %50, %51}, %52, %53, 1, 1, 0;"
        : SUM_OF_TILE(0), SUM_OF_TILE(1), SUM_OF_TILE(2), SUM_OF_TILE(3), SUM_OF_TILE(4),
          SUM_OF_TILE(5), SUM_OF_TILE(6), SUM_OF_TILE(7), SUM_OF_TILE(8), SUM_OF_TILE(9),
          SUM_OF_TILE(10), SUM_OF_TILE(11)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD));
}
template <int ADD>
DEVICE void multiply_shared(float (&sum)[16][4], uint64_t a, uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." OPERANDS " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
        "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, %64, %65, %66, 1, 1, 0, 0;"
        : SUM_OF_TILE(0), SUM_OF_TILE(1), SUM_OF_TILE(2), SUM_OF_TILE(3), SUM_OF_TILE(4),
          SUM_OF_TILE(5), SUM_OF_TILE(6), SUM_OF_TILE(7), SUM_OF_TILE(8), SUM_OF_TILE(9),
          SUM_OF_TILE(10), SUM_OF_TILE(11), SUM_OF_TILE(12), SUM_OF_TILE(13), SUM_OF_TILE(14),
          SUM_OF_TILE(15)
        : "l"(a), "l"(b), "n"(ADD));
}
template <int ADD>
DEVICE void multiply_rows(float (&sum)[16][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." OPERANDS " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
        "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, {%64, %65, %66, %67}, %68, %69, 1, 1, 0;"
        : SUM_OF_TILE(0), SUM_OF_TILE(1), SUM_OF_TILE(2), SUM_OF_TILE(3), SUM_OF_TILE(4),
          SUM_OF_TILE(5), SUM_OF_TILE(6), SUM_OF_TILE(7), SUM_OF_TILE(8), SUM_OF_TILE(9),
          SUM_OF_TILE(10), SUM_OF_TILE(11), SUM_OF_TILE(12), SUM_OF_TILE(13), SUM_OF_TILE(14),
          SUM_OF_TILE(15)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD));
}

// Wait until at most `PENDING` groups of the warp's products are under way.
template <int PENDING>
DEVICE void wait_product_groups() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Arrive once all copies that the calling thread has started are there.
DEVICE void arrive_when_copied(uint64_t* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// The threads of one group of four warps; groups count from 0.
DEVICE void sync_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }
