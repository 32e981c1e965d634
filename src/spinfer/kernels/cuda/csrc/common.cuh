// Types, PTX and small helpers shared by all kernels. NVRTC has no <cstdint>, so the fixed-width types are spelled here.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

#ifndef SPINFER_BF16
#define SPINFER_BF16 0
#endif

__device__ __forceinline__ u32 smem_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

template <int kOffset>
__device__ __forceinline__ u32 lds_u16(u32 address) {
  u32 v;
  asm volatile("ld.shared.u16 %0, [%1+%2];" : "=r"(v) : "r"(address), "n"(kOffset));
  return v;
}
__device__ __forceinline__ uint2 lds_v2(u32 address) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
__device__ __forceinline__ u32 lds_u32(u32 address) {
  u32 v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
__device__ __forceinline__ uint4 lds_v4(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ float4 lds_float4(u32 address) {
  const uint4 v = lds_v4(address);
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}
__device__ __forceinline__ void sts_u32(u32 address, u32 v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
__device__ __forceinline__ void sts_v2(u32 address, u32 x, u32 y) {
  asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(address), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void sts_v4(u32 address, u32 x, u32 y, u32 z, u32 w) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
// Of four accumulators that lie side by side.
__device__ __forceinline__ float4 as_float4(const float (&c)[4]) { return make_float4(c[0], c[1], c[2], c[3]); }
__device__ __forceinline__ void sts_float4(u32 address, const float (&c)[4]) {
  sts_v4(address, __float_as_uint(c[0]), __float_as_uint(c[1]), __float_as_uint(c[2]), __float_as_uint(c[3]));
}
__device__ __forceinline__ void add(float (&c)[4], const float4& v) {
  c[0] += v.x;
  c[1] += v.y;
  c[2] += v.z;
  c[3] += v.w;
}
__device__ __forceinline__ void add(float4& sum, const float4& v) {
  sum.x += v.x;
  sum.y += v.y;
  sum.z += v.z;
  sum.w += v.w;
}
// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ uint4 ldmatrix_x4(u32 address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address));
  return v;
}
// Two of them, at the addresses that lanes 0 to 15 give.
__device__ __forceinline__ uint2 ldmatrix_x2(u32 address) {
  uint2 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address));
  return v;
}
// The reverse of ldmatrix_x4: lane 4 g + t gives columns 2 t and 2 t + 1 of row g of each matrix.
__device__ __forceinline__ void stmatrix_x4(u32 address, const u32 (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]),
               "r"(v[3])
               : "memory");
}
// As stmatrix_x4, for transposed matrices.
__device__ __forceinline__ void stmatrix_x4_transposed(u32 address, const u32 (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}
// Writes 8 values to places `first` to `first` + 7, `first` a multiple of 8, of a row that has `count`.
__device__ __forceinline__ void store_eight(u16* row, uint4 values, i32 first, i32 count) {
  const u32 words[4] = {values.x, values.y, values.z, values.w};
  const u64 address = reinterpret_cast<u64>(row);
  if ((address & 15) == 0 && first + 8 <= count) {
    *reinterpret_cast<uint4*>(row + first) = values;
  } else if ((address & 3) == 0 && first + 8 <= count) {
#pragma unroll
    for (int e = 0; e < 4; e++) reinterpret_cast<u32*>(row + first)[e] = words[e];
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++)
      if (first + e < count) row[first + e] = static_cast<u16>(words[e / 2] >> (16 * (e % 2)));
  }
}
__device__ __forceinline__ u32 prmt(u32 a, u32 b, u32 selector) {
  u32 v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(selector));
  return v;
}
// All threads of the CTA, each role from its own place in the code: the unaligned form of __syncthreads.
__device__ __forceinline__ void cta_barrier() { asm volatile("barrier.sync 0;" ::: "memory"); }
// Named barrier among the first `threads` arrivals; barrier 0 is __syncthreads.
template <int kBarrier>
__device__ __forceinline__ void named_barrier(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
}
// The same, without waiting for the others.
template <int kBarrier>
__device__ __forceinline__ void barrier_arrive(int threads) {
  asm volatile("bar.arrive %0, %1;" ::"n"(kBarrier), "r"(threads) : "memory");
}

// Whether this is the last of `count` to arrive; then the counter is zero again. Releases what all threads wrote before a barrier
// ahead of this, acquires what others released.
__device__ __forceinline__ bool arrives_last(u32* counter, u32 count) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  const bool last = before == count - 1;
  if (last) *counter = 0;
  return last;
}

// D += A B for A 16 x 16 (row-major fragment), B 16 x 8, 16-bit values, fp32 accumulators.
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if SPINFER_BF16
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

struct Int4 {
  i32 a, b, c, d;  // rows g, g, g + 8, g + 8; columns 2 t, 2 t + 1, 2 t, 2 t + 1
};
struct Int2 {
  i32 a, b;  // row g; columns 2 t, 2 t + 1
};
// Population count of (A & B), A 8 x 128 bits, B 128 x 8 bits.
__device__ __forceinline__ Int2 bmma_and_popc(u32 a, u32 b) {
  Int2 d;
  asm volatile("mma.sync.aligned.m8n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1}, {%2}, {%3}, {%4,%4};"
               : "=r"(d.a), "=r"(d.b)
               : "r"(a), "r"(b), "r"(0));
  return d;
}
// A unsigned, B signed.
__device__ __forceinline__ Int4 imma_k16(u32 a0, u32 a1, u32 b, Int4 c) {
  Int4 d;
  asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
               : "=r"(d.a), "=r"(d.b), "=r"(d.c), "=r"(d.d)
               : "r"(a0), "r"(a1), "r"(b), "r"(c.a), "r"(c.b), "r"(c.c), "r"(c.d));
  return d;
}
__device__ __forceinline__ Int4 imma_k32(u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, Int4 c) {
  Int4 d;
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(d.a), "=r"(d.b), "=r"(d.c), "=r"(d.d)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c.a), "r"(c.b), "r"(c.c), "r"(c.d));
  return d;
}

// fp32 to the 16-bit value type, round to nearest even, and back.
__device__ __forceinline__ u16 to_value(float v) {
  u16 r;
#if SPINFER_BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
#endif
  return r;
}
__device__ __forceinline__ float to_float(u16 v) {
#if SPINFER_BF16
  return __uint_as_float(static_cast<u32>(v) << 16);
#else
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
  return r;
#endif
}