// wgmma of 64 rows: acc += A (64 x 16) B (16 x 8 kTiles), B in shared memory and A there or in registers.
#pragma once
#include "common.cuh"

#if SPINFER_BF16
#define SPINFER_WGMMA_TYPES "bf16.bf16"
#else
#define SPINFER_WGMMA_TYPES "f16.f16"
#endif

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// A matrix in shared memory: K-major, 64 values (128 bytes) a row, 128-byte swizzle; 8 rows are 1024 bytes apart.
__device__ __forceinline__ u64 wgmma_descriptor(u32 address) {
  return (static_cast<u64>(1) << 62) | (static_cast<u64>(1024 >> 4) << 32) | (static_cast<u64>(1) << 16) |
         ((address & 0x3ffffu) >> 4);
}

// The names of the accumulators' registers, and the registers, of as many tiles of 8 columns as there are kinds of wgmma here.
#define SPINFER_D16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SPINFER_D24 SPINFER_D16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define SPINFER_D32 SPINFER_D24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define SPINFER_D40 SPINFER_D32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define SPINFER_D48 SPINFER_D40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define SPINFER_D56 SPINFER_D48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define SPINFER_D64 SPINFER_D56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define SPINFER_D68 SPINFER_D64 ", %64, %65, %66, %67"
#define SPINFER_D72 SPINFER_D68 ", %68, %69, %70, %71"
#define SPINFER_D76 SPINFER_D72 ", %72, %73, %74, %75"
#define SPINFER_D80 SPINFER_D76 ", %76, %77, %78, %79"
#define SPINFER_D88 SPINFER_D80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define SPINFER_D96 SPINFER_D88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define SPINFER_D104 SPINFER_D96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define SPINFER_D112 SPINFER_D104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define SPINFER_D120 SPINFER_D112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define SPINFER_D128 SPINFER_D120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define SPINFER_C1(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define SPINFER_C2(n) SPINFER_C1(n), SPINFER_C1(n + 1)
#define SPINFER_C4(n) SPINFER_C2(n), SPINFER_C2(n + 2)
#define SPINFER_C16 SPINFER_C4(0)
#define SPINFER_C24 SPINFER_C16, SPINFER_C2(4)
#define SPINFER_C32 SPINFER_C16, SPINFER_C4(4)
#define SPINFER_C40 SPINFER_C32, SPINFER_C2(8)
#define SPINFER_C48 SPINFER_C40, SPINFER_C2(10)
#define SPINFER_C56 SPINFER_C48, SPINFER_C2(12)
#define SPINFER_C64 SPINFER_C56, SPINFER_C2(14)
#define SPINFER_C68 SPINFER_C64, SPINFER_C1(16)
#define SPINFER_C72 SPINFER_C68, SPINFER_C1(17)
#define SPINFER_C76 SPINFER_C72, SPINFER_C1(18)
#define SPINFER_C80 SPINFER_C76, SPINFER_C1(19)
#define SPINFER_C88 SPINFER_C80, SPINFER_C2(20)
#define SPINFER_C96 SPINFER_C88, SPINFER_C2(22)
#define SPINFER_C104 SPINFER_C96, SPINFER_C2(24)
#define SPINFER_C112 SPINFER_C104, SPINFER_C2(26)
#define SPINFER_C120 SPINFER_C112, SPINFER_C2(28)
#define SPINFER_C128 SPINFER_C120, SPINFER_C2(30)

// A in registers, a fragment of 16 rows in each warp. The last five numbers are the operands after the accumulators.
#define SPINFER_WGMMA_KIND(columns, registers, a0, a1, a2, a3, b0)                                              \
  __device__ __forceinline__ void wgmma(float (&c)[columns / 8][4], const u32 (&a)[4], u64 b) {                 \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." SPINFER_WGMMA_TYPES                    \
                 " {" SPINFER_D##registers "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b0 ", 1, 1, 1, 0;" \
                 : SPINFER_C##registers                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                         \
  }
SPINFER_WGMMA_KIND(48, 24, 24, 25, 26, 27, 28)
SPINFER_WGMMA_KIND(64, 32, 32, 33, 34, 35, 36)
SPINFER_WGMMA_KIND(80, 40, 40, 41, 42, 43, 44)
SPINFER_WGMMA_KIND(96, 48, 48, 49, 50, 51, 52)
SPINFER_WGMMA_KIND(112, 56, 56, 57, 58, 59, 60)
SPINFER_WGMMA_KIND(128, 64, 64, 65, 66, 67, 68)
SPINFER_WGMMA_KIND(136, 68, 68, 69, 70, 71, 72)
SPINFER_WGMMA_KIND(144, 72, 72, 73, 74, 75, 76)
SPINFER_WGMMA_KIND(152, 76, 76, 77, 78, 79, 80)
SPINFER_WGMMA_KIND(160, 80, 80, 81, 82, 83, 84)
SPINFER_WGMMA_KIND(176, 88, 88, 89, 90, 91, 92)
SPINFER_WGMMA_KIND(192, 96, 96, 97, 98, 99, 100)
SPINFER_WGMMA_KIND(208, 104, 104, 105, 106, 107, 108)
SPINFER_WGMMA_KIND(224, 112, 112, 113, 114, 115, 116)
SPINFER_WGMMA_KIND(240, 120, 120, 121, 122, 123, 124)
SPINFER_WGMMA_KIND(256, 128, 128, 129, 130, 131, 132)

// A in shared memory. With `add` 0 acc is overwritten.
#define SPINFER_WGMMA_SHARED_KIND(columns, registers, a0, b0, add0)                                              \
  __device__ __forceinline__ void wgmma(float (&c)[columns / 8][4], u64 a, u64 b, u32 add) {                     \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #add0 ", 0;\n"                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." SPINFER_WGMMA_TYPES                     \
                 " {" SPINFER_D##registers "}, %" #a0 ", %" #b0 ", add, 1, 1, 0, 0;\n}"                          \
                 : SPINFER_C##registers                                                                          \
                 : "l"(a), "l"(b), "r"(add));                                                                    \
  }
SPINFER_WGMMA_SHARED_KIND(128, 64, 64, 65, 66)
SPINFER_WGMMA_SHARED_KIND(144, 72, 72, 73, 74)
SPINFER_WGMMA_SHARED_KIND(160, 80, 80, 81, 82)
SPINFER_WGMMA_SHARED_KIND(176, 88, 88, 89, 90)
SPINFER_WGMMA_SHARED_KIND(192, 96, 96, 97, 98)
SPINFER_WGMMA_SHARED_KIND(208, 104, 104, 105, 106)
SPINFER_WGMMA_SHARED_KIND(224, 112, 112, 113, 114)
SPINFER_WGMMA_SHARED_KIND(240, 120, 120, 121, 122)
SPINFER_WGMMA_SHARED_KIND(256, 128, 128, 129, 130)
