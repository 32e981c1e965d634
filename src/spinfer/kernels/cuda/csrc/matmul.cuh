// What the matmul kernels share: their arguments, how chunks are dealt out, and how partial sums meet.
//
// Chunks 0 .. T - 1 are dealt in order, one range of consecutive chunks a CTA. A segment is the part of a range that lies in
// one row block (kChunkRows rows). A segment that covers its row block writes y; any other writes an fp32 partial, and the
// last CTA to arrive at a row block sums its partials in the order of the ranges. The sums are therefore the same whoever
// computes them, and no CTA ever waits for another.
#pragma once
#include "common.cuh"
#include "layout.cuh"

#ifndef SPINFER_TOKENS
#define SPINFER_TOKENS 16
#endif
constexpr int kTokens = SPINFER_TOKENS;  // columns of a pass over the weight: N, rounded up to a multiple of 8
constexpr int kTiles = kTokens / 8;
static_assert(kTokens % 8 == 0);

struct MatmulArgs {
  const u8* weight;     // chunks
  const i32* offsets;   // [T + 1], in kOffsetUnit
  const u16* x;         // (tokens, x_stride)
  u16* y;               // (tokens, M)
  const u16* bias;      // [M] or null
  float* partials;      // [2 gridDim.x][kChunkRows kTokens]
  u32* arrivals;        // [row blocks], all zero between launches
  i32 x_stride, tokens;
  i32 out_features, in_features;
  i32 chunks_k, chunks;
  i32 each, extra;  // chunks a CTA; the first `extra` CTAs take one more
  i32 slots, ring, in_flight;
};

struct Range {
  i32 index, begin, end;
};
__device__ __forceinline__ Range range_at(const MatmulArgs& p, i32 index) {
  const i32 begin = index * p.each + min(index, p.extra);
  return {index, begin, begin + p.each + (index < p.extra)};
}
// The range that holds a chunk. There are no more CTAs than chunks, so none is empty.
__device__ __forceinline__ Range range_of(const MatmulArgs& p, i32 chunk) {
  const i32 longer = p.extra * (p.each + 1);
  return range_at(p, chunk < longer ? chunk / (p.each + 1) : p.extra + (chunk - longer) / p.each);
}

constexpr int kPartialFloats = kChunkRows * kTokens;
constexpr int kPartialVectors = kPartialFloats / 4;
// Partial of one fragment: float4 [row of blocks][tile][8 tokens][lane].
__device__ __forceinline__ int fragment_index(int block_row, int r, int n, int lane) {
  return ((block_row * 2 + r) * kTiles + n) * 32 + lane;
}
// A range has at most two partial segments: the one it begins in, and the last if another row block begins inside it.
__device__ __forceinline__ float4* partial_of(const MatmulArgs& p, const Range& range, i32 row_block) {
  const int second = range.begin < row_block * p.chunks_k;
  return reinterpret_cast<float4*>(p.partials) + (static_cast<i64>(range.index) * 2 + second) * kPartialVectors;
}

// v: rows `row`, `row`, `row` + 8, `row` + 8; columns `token`, `token` + 1, likewise.
__device__ __forceinline__ void store_fragment(const MatmulArgs& p, i32 row, i32 token, float4 v) {
  const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const i32 m = row + half * 8;
    if (m >= p.out_features) continue;
    const float bias = p.bias ? to_float(p.bias[m]) : 0.f;
#pragma unroll
    for (int b = 0; b < 2; b++)
      if (token + b < p.tokens) p.y[static_cast<i64>(token + b) * p.out_features + m] = to_value(values[2 * half + b] + bias);
  }
}

// Called by `threads` threads after they wrote a partial of the row block: tells all of them whether this CTA came last.
__device__ __forceinline__ bool arrive_last(const MatmulArgs& p, i32 row_block, u32 flag, int thread, int threads) {
  named_barrier<1>(threads);
  if (thread == 0) {
    const i32 first = row_block * p.chunks_k;
    const u32 parts = range_of(p, first + p.chunks_k - 1).index - range_of(p, first).index + 1;
    __threadfence();
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(p.arrivals + row_block) : "memory");
    const bool last = before == parts - 1;
    if (last) p.arrivals[row_block] = 0;
    __threadfence();
    sts_u32(flag, last);
  }
  named_barrier<1>(threads);
  return lds_u32(flag) != 0;
}

// Sums the partials of a row block in the order of the ranges and writes y.
__device__ __forceinline__ void reduce_partials(const MatmulArgs& p, i32 row_block, int thread, int threads) {
  const i32 first = row_block * p.chunks_k;
  const Range head = range_of(p, first);
  const i32 parts = range_of(p, first + p.chunks_k - 1).index - head.index + 1;
  const float4* head_partial = partial_of(p, head, row_block);
  const float4* rest = reinterpret_cast<const float4*>(p.partials) + static_cast<i64>(head.index) * 2 * kPartialVectors;
#pragma unroll 1
  for (int i = thread; i < kPartialVectors; i += threads) {
    float4 sum = __ldcg(head_partial + i);
    const float4* part = rest + i;
    i32 j = 1;
    for (; j + 3 < parts; j += 4) {
      float4 v[4];
#pragma unroll
      for (int u = 0; u < 4; u++) v[u] = __ldcg(part + static_cast<i64>(j + u) * 2 * kPartialVectors);
#pragma unroll
      for (int u = 0; u < 4; u++) {
        sum.x += v[u].x;
        sum.y += v[u].y;
        sum.z += v[u].z;
        sum.w += v[u].w;
      }
    }
    for (; j < parts; j++) {
      const float4 v = __ldcg(part + static_cast<i64>(j) * 2 * kPartialVectors);
      sum.x += v.x;
      sum.y += v.y;
      sum.z += v.z;
      sum.w += v.w;
    }
    const int lane = i & 31, n = (i >> 5) % kTiles, tile = (i >> 5) / kTiles;
    store_fragment(p, row_block * kChunkRows + tile * 16 + (lane >> 2), n * 8 + 2 * (lane & 3), sum);
  }
}

// Adds up the accumulators of the warps along k (kWarpsK of them, warp_k fastest last) through shared memory, then
// writes y or a partial. All `threads` consumer threads call it; accumulators are zero afterwards.
template <int kWarpsK>
__device__ __forceinline__ void finish_segment(const MatmulArgs& p, float (&acc)[2][kTiles][4], const Range& range, i32 row_block,
                                               u32 scratch, u32 flag, int warp_m, int warp_k, int lane, int thread, int threads) {
  constexpr int kPass = kTiles < 2 ? kTiles : 2;  // 8-token tiles a pass through `scratch`
  const i32 first = row_block * p.chunks_k;
  const bool whole = range.begin <= first && range.end >= first + p.chunks_k;
  float4* partial = partial_of(p, range, row_block);
#pragma unroll
  for (int n0 = 0; n0 < kTiles; n0 += kPass) {
    if constexpr (kWarpsK > 1) {
      named_barrier<1>(threads);  // `scratch` is free: the pass or segment before has been read
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int j = 0; j < kPass && n0 + j < kTiles; j++) {
          float(&c)[4] = acc[r][n0 + j];
          const u32 at = scratch + (((((warp_k - 1) * kBlocksM + warp_m) * 2 + r) * kPass + j) * 32 + lane) * 16;
          if (warp_k) sts_v4(at, __float_as_uint(c[0]), __float_as_uint(c[1]), __float_as_uint(c[2]), __float_as_uint(c[3]));
        }
      named_barrier<1>(threads);
    }
    if (warp_k == 0) {
#pragma unroll
      for (int r = 0; r < 2; r++)
#pragma unroll
        for (int j = 0; j < kPass && n0 + j < kTiles; j++) {
          float(&c)[4] = acc[r][n0 + j];
#pragma unroll
          for (int q = 1; q < kWarpsK; q++) {
            const uint4 v = lds_v4(scratch + (((((q - 1) * kBlocksM + warp_m) * 2 + r) * kPass + j) * 32 + lane) * 16);
            c[0] += __uint_as_float(v.x);
            c[1] += __uint_as_float(v.y);
            c[2] += __uint_as_float(v.z);
            c[3] += __uint_as_float(v.w);
          }
          const float4 v = make_float4(c[0], c[1], c[2], c[3]);
          if (whole) {
            store_fragment(p, row_block * kChunkRows + warp_m * kBlockRows + r * 16 + (lane >> 2), (n0 + j) * 8 + 2 * (lane & 3), v);
          } else {
            __stcg(partial + fragment_index(warp_m, r, n0 + j, lane), v);
          }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int j = 0; j < kPass && n0 + j < kTiles; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[r][n0 + j][i] = 0.f;
  }
  if (!whole) {
    if (arrive_last(p, row_block, flag, thread, threads)) reduce_partials(p, row_block, thread, threads);
  }
}
__device__ constexpr int scratch_bytes(int warps_k) { return (warps_k - 1) * kBlocksM * 2 * (kTiles < 2 ? kTiles : 2) * 512; }
