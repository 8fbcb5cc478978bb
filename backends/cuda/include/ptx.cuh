// The instructions that C++ has no word for. The emulator of the tests puts its own file of this name, with the same
// functions, in front of this one; nothing else in the kernels is more than C++.
#pragma once

// NVRTC has no headers of the C++ library.
using int8_t = signed char;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define PARAMETER const __grid_constant__

#define INFINITE __int_as_float(0x7f800000)

// All shared memory is dynamic: the launcher and the resource model count the same bytes.
DEVICE uint8_t* shared_memory() {
    extern __shared__ __align__(1024) uint8_t shared_bytes[];
    return shared_bytes;
}

DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// ---- arithmetic ----

DEVICE float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#if BFLOAT16
DEVICE float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE uint32_t pack(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
constexpr uint32_t PAIR_OF_ONES = 0x3f803f80u;
#else
DEVICE float low_half(uint32_t pair) {
    float x;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(x) : "r"(pair));
    return x;
}
DEVICE float high_half(uint32_t pair) {
    float x;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}" : "=f"(x) : "r"(pair));
    return x;
}
DEVICE float saturated(float x) { return fminf(fmaxf(x, -65504.0f), 65504.0f); }
DEVICE uint32_t pack(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(saturated(high)), "f"(saturated(low)));
    return pair;
}
constexpr uint32_t PAIR_OF_ONES = 0x3c003c00u;
#endif

DEVICE float square_root(float x) {
    float y;
    asm("sqrt.rn.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The same number of a thread, warp or lane, as if the compiler had not seen it before: what follows from it is
// computed where it is needed, and takes no register in the loops around.
DEVICE int anew(int x) {
    asm volatile("" : "+r"(x));
    __builtin_assume(x >= 0 && x < 1024);
    return x;
}

// threadIdx.x, read from its special register where it is needed; see anew.
DEVICE int thread_anew() {
    int x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    __builtin_assume(x >= 0 && x < 1024);
    return x;
}

// ---- threads of a block ----

DEVICE float from_lane(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
DEVICE float from_lane_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
// The bits that some lane has, in all of them: the compiler knows that it is one number.
DEVICE int any_lane(int bits) { return __reduce_or_sync(0xffffffffu, unsigned(bits)); }
// A number that all lanes have, so that the compiler knows that they have it.
DEVICE int uniform(int x) { return any_lane(x); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }

// ---- copies from global to shared memory that run on their own ----

DEVICE void copy_16_async(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// 16 bytes, or zeros.
DEVICE void copy_16_async(uint32_t to, const void* from, bool read) {
    asm volatile(
        "{.reg .pred ignore; setp.eq.s32 ignore, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, ignore;}" ::"r"(to),
        "l"(from), "r"(int(read))
        : "memory");
}
// 16 bytes, of which the first `bytes` are read and the others are zero.
DEVICE void copy_part_of_16_async(uint32_t to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most `PENDING` groups of the calling thread's copies are under way.
template <int PENDING>
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

DEVICE void store_shared_16(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

DEVICE void load_shared_16(uint32_t (&to)[4], uint32_t from) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

// ---- matrix products of one warp ----

// Four 8 x 8 matrices; lane 8i + r gives the address of row r of matrix i.
DEVICE void load_matrices(uint32_t (&to)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}
DEVICE void load_matrices_transposed(uint32_t (&to)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// sum += a b: 16 x 8 += (16 x 16) (16 x 8).
DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if BFLOAT16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
