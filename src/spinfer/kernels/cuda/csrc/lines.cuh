// Writing y, whose rows are tokens, from sums whose rows are rows of W: in whole lines, by way of shared memory. Of a kernel's
// arguments this needs y, bias, and what y_stride_of and rows_of say: values from one token to the next, and rows of W.
#pragma once
#include "common.cuh"

constexpr int kBarrierOfGroup = 3;  // of the first warpgroup; those of the others follow
constexpr u32 kLinesBytes = 4096;   // two buffers of a warpgroup

__device__ __forceinline__ void group_barrier(int warp) {
  asm volatile("bar.sync %0, 128;" ::"r"(kBarrierOfGroup + (warp >> 2)) : "memory");
}

// Writes 64 kEach rows x 16 / kEach tokens of y. A warpgroup calls it; warp w of it has, for lane 4 g + t, rows g, g, g + 8, g + 8
// and tokens 2 t, 2 t + 1, likewise, of two fragments: of bands 2 w and 2 w + 1, or, with kEach 1, of band w and of 8 tokens and the
// next 8. `buffer` alternates between two, so that one barrier is enough.
template <int kEach, class Args>
__device__ __forceinline__ void store_lines(const Args& p, i32 row, i32 token, i32 end, const float4 (&v)[2],
                                            const float2 (&bias)[kEach], u32 buffer, int warp, int lane) {
  const int matrix = lane >> 3, in_matrix = lane & 7, in_group = warp & 3;
  constexpr int kPieces = 8 * kEach;  // 16 bytes of a line
  u32 words[4];
#pragma unroll
  for (int q = 0; q < 2; q++) {
    const float2 b = bias[q % kEach];
    words[2 * q] = static_cast<u32>(to_value(v[q].x + b.x)) | static_cast<u32>(to_value(v[q].y + b.x)) << 16;
    words[2 * q + 1] = static_cast<u32>(to_value(v[q].z + b.y)) | static_cast<u32>(to_value(v[q].w + b.y)) << 16;
  }
  const int line = kEach == 2 ? in_matrix : matrix / 2 * 8 + in_matrix;
  const int piece = kEach == 2 ? in_group * 4 + matrix : in_group * 2 + matrix % 2;
  stmatrix_x4_transposed(buffer + (line * kPieces + (piece ^ in_matrix)) * 16, words);
  group_barrier(warp);
  const int place = in_group * 32 + lane, t = place / kPieces, at = place % kPieces;
  const uint4 values = lds_v4(buffer + (t * kPieces + (at ^ (t & 7))) * 16);
  if (token + t < end) store_eight(p.y + static_cast<i64>(token + t) * y_stride_of(p), values, row + at * 8, rows_of(p));
}
// Of rows g and g + 8 of a band.
template <class Args>
__device__ __forceinline__ float2 bias_of(const Args& p, i32 band_row, int lane) {
  const i32 m = band_row + (lane >> 2);
  return {p.bias && m < rows_of(p) ? to_float(p.bias[m]) : 0.f, p.bias && m + 8 < rows_of(p) ? to_float(p.bias[m + 8]) : 0.f};
}
