// What the matmul kernels share: their arguments, how chunks are dealt out, and how partial sums meet.
//
// The work is passes x row blocks x chunks along k, in this order: a pass has kTokens columns of y, a row block kChunkRows rows.
// A strip is one row block in one pass. Units 0 .. T - 1 are dealt in order, one range of consecutive units a CTA. A segment is
// the part of a range that lies in one strip. A segment that covers its strip writes y; any other is a partial sum, and the
// last CTA to arrive at a strip adds them in the order of the ranges. The sums are therefore the same whoever computes them,
// and no CTA ever waits for another.
//
// With kSplit > 1 clusters share strips instead: each CTA of a cluster takes a part of a strip's chunks along k, and one of
// them, in turn, adds the others' sums, which they write into its shared memory. All CTAs of a cluster run at once by definition.
#pragma once
#include "common.cuh"
#include "layout.cuh"

#ifndef SPINFER_TOKENS
#define SPINFER_TOKENS 16
#endif
constexpr int kTokens = SPINFER_TOKENS;  // columns of a pass over the weight: N, rounded up to a multiple of 8
constexpr int kTiles = kTokens / 8;
static_assert(kTokens % 8 == 0);

#ifndef SPINFER_SPLIT
#define SPINFER_SPLIT 1
#endif
constexpr int kSplit = SPINFER_SPLIT;

struct MatmulArgs {
  const u8* weight;     // chunks
  const i32* offsets;   // [T + 1], in kOffsetUnit
  const u16* x;         // (tokens, x_stride)
  u16* y;               // (tokens, M)
  const u16* bias;      // [M] or null
  float* partials;      // [2 gridDim.x][kChunkRows kTokens]
  u32* arrivals;        // [strips], all zero between launches
  i32 x_stride, tokens;
  i32 out_features, in_features;
  i32 chunks_k, row_blocks;
  i32 strips;       // passes x row blocks
  i32 each, extra;  // units a CTA; the first `extra` CTAs take one more
  i32 ring_at, ring, in_flight;  // of the weight, in shared memory; in matmul_portable.cu `ring` is a warp's
  // Of x, likewise: a power of two up to 32 tokens, beyond a multiple of the warps along k (tests/test_cuda_boxes.py).
  i32 boxes;
};

struct Range {
  i32 index, begin, end;
};
__device__ __forceinline__ Range range_at(const MatmulArgs& p, i32 index) {
  const i32 begin = index * p.each + min(index, p.extra);
  return {index, begin, begin + p.each + (index < p.extra)};
}
// The range that holds a unit. There are no more CTAs than units, so none is empty.
__device__ __forceinline__ Range range_of(const MatmulArgs& p, i32 unit) {
  const i32 longer = p.extra * (p.each + 1);
  return range_at(p, unit < longer ? unit / (p.each + 1) : p.extra + (unit - longer) / p.each);
}

struct Place {
  i32 strip, k;  // k: of a chunk, along k
};
// What one CTA does: `count` chunks, runs of k_count along k in strips that are strip_step apart.
struct Work {
  i32 count, skipped, first_strip, strip_step, k_begin, k_count;
  __device__ __forceinline__ explicit Work(const MatmulArgs& p) {
    const i32 cta = static_cast<i32>(blockIdx.x);
    if constexpr (kSplit > 1) {
      const i32 rank = cta % kSplit;
      first_strip = cta / kSplit;
      strip_step = static_cast<i32>(gridDim.x) / kSplit;
      k_begin = rank * p.chunks_k / kSplit;
      k_count = (rank + 1) * p.chunks_k / kSplit - k_begin;
      count = (p.strips - first_strip + strip_step - 1) / strip_step * k_count;
      skipped = 0;
    } else {
      const Range range = range_at(p, cta);
      first_strip = 0;
      strip_step = 1;
      k_begin = 0;
      k_count = p.chunks_k;
      count = range.end - range.begin;
      skipped = range.begin;
    }
  }
  __device__ __forceinline__ Place at(i32 i) const {
    const i32 j = i + skipped;
    return {first_strip + j / k_count * strip_step, k_begin + j % k_count};
  }
  __device__ __forceinline__ i32 k_end() const { return k_begin + k_count; }
};
__device__ __forceinline__ i32 row_block_of(const MatmulArgs& p, i32 strip) { return strip % p.row_blocks; }
__device__ __forceinline__ i32 first_token_of(const MatmulArgs& p, i32 strip) { return strip / p.row_blocks * kTokens; }

constexpr int kBands = kBlocksM * 2;  // of 16 rows, in a chunk
constexpr int kPartialFloats = kChunkRows * kTokens;
constexpr int kPartialVectors = kPartialFloats / 4;
// Partial sums and the like of one fragment: float4 [band][8 tokens][lane].
__device__ __forceinline__ int fragment_index(int band, int n, int lane) { return (band * kTiles + n) * 32 + lane; }
// A range has at most two partial segments: the one it begins in, and the last if another strip begins inside it.
__device__ __forceinline__ float4* partial_of(const MatmulArgs& p, const Range& range, i32 strip) {
  const int second = range.begin < strip * p.chunks_k;
  return reinterpret_cast<float4*>(p.partials) + (static_cast<i64>(range.index) * 2 + second) * kPartialVectors;
}

__device__ __forceinline__ u32 transpose_8x8(u32 v) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}
// Writes 16 rows x 8 tokens of y. v: rows g, g, g + 8, g + 8; tokens 2 t, 2 t + 1, likewise, for lane 4 g + t. The whole warp
// calls it. For many tokens 8 x 8 values are transposed, so that two rows of a token lie in one register; with few there is
// little to write, and transposing accumulators makes the compiler serialise the wgmmas of 24 and 32 tokens.
__device__ __forceinline__ void store_fragment(const MatmulArgs& p, i32 row, i32 token, float4 v, int lane) {
  const int g = lane >> 2, t = lane & 3;
  const float values[2][2] = {{v.x, v.y}, {v.z, v.w}};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const i32 from = row + half * 8, mine = from + g;
    const float bias = p.bias && mine < p.out_features ? to_float(p.bias[mine]) : 0.f;
    const u32 both = static_cast<u32>(to_value(values[half][0] + bias)) | static_cast<u32>(to_value(values[half][1] + bias)) << 16;
    if constexpr (kTokens > 32) {
      const u32 rows = transpose_8x8(both);
      const i32 m = from + 2 * t, n = token + g;
      if (n >= p.tokens || m >= p.out_features) continue;
      u16* y = p.y + static_cast<i64>(n) * p.out_features + m;
      if ((p.out_features & 1) == 0) {
        *reinterpret_cast<u32*>(y) = rows;
      } else {
        y[0] = static_cast<u16>(rows);
        if (m + 1 < p.out_features) y[1] = static_cast<u16>(rows >> 16);
      }
    } else {
      if (mine >= p.out_features) continue;
#pragma unroll
      for (int b = 0; b < 2; b++) {
        const i32 n = token + 2 * t + b;
        if (n < p.tokens) p.y[static_cast<i64>(n) * p.out_features + mine] = static_cast<u16>(both >> (16 * b));
      }
    }
  }
}

constexpr int kPass = kTokens > 32 ? 2 : 1;  // 8-token tiles that sum_warps takes through `scratch` at a time
// Adds up the accumulators of the warps along k (kWarpsK of them) through shared memory, in their order, in the warps with
// warp_k 0. kBandsAWarp bands a warp, from `band` on. All `threads` consumer threads call it.
template <int kWarpsK, int kBandsAWarp>
__device__ __forceinline__ void sum_warps(float (&acc)[kBandsAWarp][kTiles][4], u32 scratch, int band, int warp_k, int lane, int threads) {
  if constexpr (kWarpsK > 1) {
    auto at = [&](int q, int r, int j) { return scratch + ((((q - 1) * kBands + band + r) * kPass + j) * 32 + lane) * 16; };
#pragma unroll
    for (int n0 = 0; n0 < kTiles; n0 += kPass) {
      named_barrier<1>(threads);  // `scratch` is free: the pass or segment before has been read
      if (warp_k) {
#pragma unroll
        for (int r = 0; r < kBandsAWarp; r++)
#pragma unroll
          for (int j = 0; j < kPass && n0 + j < kTiles; j++) {
            const float(&c)[4] = acc[r][n0 + j];
            sts_v4(at(warp_k, r, j), __float_as_uint(c[0]), __float_as_uint(c[1]), __float_as_uint(c[2]), __float_as_uint(c[3]));
          }
      }
      named_barrier<1>(threads);
      if (warp_k == 0) {
#pragma unroll
        for (int r = 0; r < kBandsAWarp; r++)
#pragma unroll
          for (int j = 0; j < kPass && n0 + j < kTiles; j++) {
            float(&c)[4] = acc[r][n0 + j];
#pragma unroll
            for (int q = 1; q < kWarpsK; q++) {
              const float4 v = lds_float4(at(q, r, j));
              c[0] += v.x;
              c[1] += v.y;
              c[2] += v.z;
              c[3] += v.w;
            }
          }
      }
    }
  }
}
__device__ constexpr int scratch_bytes(int warps_k) { return (warps_k - 1) * kBands * kPass * 512; }

template <int kBandsAWarp>
__device__ __forceinline__ void clear(float (&acc)[kBandsAWarp][kTiles][4]) {
#pragma unroll
  for (int r = 0; r < kBandsAWarp; r++)
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) acc[r][n][i] = 0.f;
}
template <int kBandsAWarp>
__device__ __forceinline__ void store(const MatmulArgs& p, const float (&acc)[kBandsAWarp][kTiles][4], i32 strip, int band, int lane) {
  const i32 row = row_block_of(p, strip) * kChunkRows + band * 16, token = first_token_of(p, strip);
#pragma unroll
  for (int r = 0; r < kBandsAWarp; r++)
#pragma unroll
    for (int n = 0; n < kTiles; n++) {
      store_fragment(p, row + r * 16, token + n * 8, make_float4(acc[r][n][0], acc[r][n][1], acc[r][n][2], acc[r][n][3]), lane);
      asm volatile("" ::: "memory");  // keeps the compiler from loading all biases first, and spilling
    }
}

// Where the partials of a strip are: that of range j of those that have one.
struct Partials {
  const float4 *head, *rest;
  int count;

  __device__ __forceinline__ Partials(const MatmulArgs& p, i32 strip) {
    const i32 first = strip * p.chunks_k;
    const Range range = range_of(p, first);
    count = range_of(p, first + p.chunks_k - 1).index - range.index + 1;
    head = partial_of(p, range, strip);
    // Ranges after the first begin in this strip, so theirs is the first of their partials.
    rest = reinterpret_cast<const float4*>(p.partials) + static_cast<i64>(range.index) * 2 * kPartialVectors;
  }
  __device__ __forceinline__ const float4* of(int j) const { return j ? rest + static_cast<i64>(j) * 2 * kPartialVectors : head; }
};
__device__ __forceinline__ void add(float4& sum, const float4& v) {
  sum.x += v.x;
  sum.y += v.y;
  sum.z += v.z;
  sum.w += v.w;
}

constexpr bool kByBands = kTokens > 64;  // for less, 16 warps have too few registers: 112 us instead of 105 at 64 tokens
constexpr int kStoreBands = 4;
constexpr u32 kStoreBytes = 8 * kStoreBands * 32;  // 8 tokens of as many bands, in shared memory
// Writes 8 tokens of 64 rows by way of shared memory, whole lines of y. v: fragments of the bands, as store_fragment takes them.
__device__ __forceinline__ void store_bands(const MatmulArgs& p, i32 row, i32 token, const float4 (&v)[kStoreBands], u32 buffer, int lane) {
  const int g = lane >> 2, matrix = lane >> 3, in_matrix = lane & 7;
#pragma unroll
  for (int b = 0; b < kStoreBands; b += 2) {
    u32 rows[4];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const i32 m = row + (b + j) * 16 + g;
      const float upper = p.bias && m < p.out_features ? to_float(p.bias[m]) : 0.f;
      const float lower = p.bias && m + 8 < p.out_features ? to_float(p.bias[m + 8]) : 0.f;
      rows[2 * j] = static_cast<u32>(to_value(v[b + j].x + upper)) | static_cast<u32>(to_value(v[b + j].y + upper)) << 16;
      rows[2 * j + 1] = static_cast<u32>(to_value(v[b + j].z + lower)) | static_cast<u32>(to_value(v[b + j].w + lower)) << 16;
    }
    stmatrix_x4_transposed(buffer + in_matrix * 128 + ((b * 2 + matrix) ^ in_matrix) * 16, rows);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int t = i * 4 + matrix;
    const i32 n = token + t, m = row + in_matrix * 8;
    const uint4 values = lds_v4(buffer + t * 128 + (in_matrix ^ t) * 16);
    if (n >= p.tokens) continue;
    store_eight(p.y + static_cast<i64>(n) * p.out_features, values, m, p.out_features);
  }
  __syncwarp();
}

// Sums the partials of a strip in the order of the ranges and writes y. All consumer threads call it. kStoreBytes of each warp
// at `scratch` are free, with kByBands.
template <int kThreads>
__device__ __forceinline__ void reduce_partials(const MatmulArgs& p, i32 strip, u32 scratch, int thread) {
  const Partials partials(p, strip);
  const i32 row = row_block_of(p, strip) * kChunkRows, token = first_token_of(p, strip);
  const int lane = thread & 31, warp = thread >> 5;
  if constexpr (kByBands) {
    static_assert(kThreads <= 256);
    // What is in flight at a time: with 16 KB of a CTA adding up 128 tokens took 16 us.
    constexpr int kGroups = kTiles * kBands / kStoreBands, kAtOnce = 2, kParts = 2;
#pragma unroll 1
    for (int group = warp * kAtOnce; group < kGroups; group += kThreads / 32 * kAtOnce) {
      float4 sum[kAtOnce][kStoreBands] = {};
      auto index = [&](int u, int b) { return fragment_index((group + u) / kTiles * kStoreBands + b, (group + u) % kTiles, lane); };
#pragma unroll 1
      for (int j = 0; j < partials.count; j += kParts) {
        float4 v[kParts][kAtOnce][kStoreBands] = {};
#pragma unroll
        for (int q = 0; q < kParts; q++)
          if (j + q < partials.count)
#pragma unroll
            for (int u = 0; u < kAtOnce; u++)
#pragma unroll
              for (int b = 0; b < kStoreBands; b++)
                if (group + u < kGroups) v[q][u][b] = __ldcg(partials.of(j + q) + index(u, b));
#pragma unroll
        for (int q = 0; q < kParts; q++)
#pragma unroll
          for (int u = 0; u < kAtOnce; u++)
#pragma unroll
            for (int b = 0; b < kStoreBands; b++) add(sum[u][b], v[q][u][b]);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; u++)
        if (group + u < kGroups)
          store_bands(p, row + (group + u) / kTiles * kStoreBands * 16, token + (group + u) % kTiles * 8, sum[u],
                      scratch + warp * kStoreBytes, lane);
    }
  } else {
    constexpr int kVectors = kPartialVectors % kThreads ? 1 : kPartialVectors / kThreads;
    constexpr int kParts = kThreads <= 256 ? 2 : 1;
#pragma unroll 1
    for (int i = thread; i < kPartialVectors; i += kVectors * kThreads) {
      float4 sum[kVectors] = {};
#pragma unroll 1
      for (int j = 0; j < partials.count; j += kParts) {
        float4 v[kParts][kVectors] = {};
#pragma unroll
        for (int q = 0; q < kParts; q++)
          if (j + q < partials.count)
#pragma unroll
            for (int u = 0; u < kVectors; u++) v[q][u] = __ldcg(partials.of(j + q) + i + u * kThreads);
#pragma unroll
        for (int q = 0; q < kParts; q++)
#pragma unroll
          for (int u = 0; u < kVectors; u++) add(sum[u], v[q][u]);
      }
#pragma unroll
      for (int u = 0; u < kVectors; u++) {
        const int fragment = (i + u * kThreads) >> 5;
        store_fragment(p, row + fragment / kTiles * 16, token + fragment % kTiles * 8, sum[u], lane);
      }
    }
  }
}

// Whether a range has all of a strip.
__device__ __forceinline__ bool covers(const MatmulArgs& p, const Range& range, i32 strip) {
  return range.begin <= strip * p.chunks_k && range.end >= (strip + 1) * p.chunks_k;
}
// Whether this CTA is the last to have left its partial of a strip. All consumer threads call it.
template <int kThreads>
__device__ __forceinline__ bool last_to_arrive(const MatmulArgs& p, i32 strip, u32 flag, int thread) {
  const i32 first = strip * p.chunks_k;
  named_barrier<1>(kThreads);
  if (thread == 0) {
    const u32 parts = range_of(p, first + p.chunks_k - 1).index - range_of(p, first).index + 1;
    u32 before;
    // Releases what all threads wrote before the barrier, and acquires what the other CTAs released.
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(p.arrivals + strip) : "memory");
    const bool last = before == parts - 1;
    if (last) p.arrivals[strip] = 0;
    sts_u32(flag, last);
  }
  named_barrier<1>(kThreads);
  return lds_u32(flag);
}

// Ends a segment without kSplit: adds up, and writes y or leaves a partial. All consumer threads call it.
template <int kWarpsK, int kBandsAWarp>
__device__ __forceinline__ void finish_segment(const MatmulArgs& p, float (&acc)[kBandsAWarp][kTiles][4], i32 strip, u32 scratch,
                                               u32 flag, int band, int warp_k, int lane) {
  constexpr int kThreads = kBands / kBandsAWarp * kWarpsK * 32;
  const int thread = (warp_k * (kBands / kBandsAWarp) + band / kBandsAWarp) * 32 + lane;
  const Range range = range_at(p, static_cast<i32>(blockIdx.x));
  const bool whole = covers(p, range, strip);
  // With more accumulators the compiler spills; those go by way of a partial even if they are the only one.
  constexpr bool kDirect = kBandsAWarp * kTiles <= 16;
  sum_warps<kWarpsK, kBandsAWarp>(acc, scratch, band, warp_k, lane, kThreads);
  if (warp_k == 0) {
    if (kDirect && whole) {
      store(p, acc, strip, band, lane);
    } else {
      float4* partial = partial_of(p, range, strip) + fragment_index(band, 0, lane);
#pragma unroll
      for (int r = 0; r < kBandsAWarp; r++)
#pragma unroll
        for (int n = 0; n < kTiles; n++)
          __stcg(partial + (r * kTiles + n) * 32, make_float4(acc[r][n][0], acc[r][n][1], acc[r][n][2], acc[r][n][3]));
    }
  }
  clear(acc);  // in one place for both, or wgmmas are serialised
  if (kDirect && whole) return;
  if (!kDirect && whole) {
    named_barrier<1>(kThreads);
    reduce_partials<kThreads>(p, strip, scratch, thread);
    named_barrier<1>(kThreads);  // it has been read
    return;
  }
  if (last_to_arrive<kThreads>(p, strip, flag, thread)) reduce_partials<kThreads>(p, strip, scratch, thread);
}
