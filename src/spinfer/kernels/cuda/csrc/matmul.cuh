// What the matmul kernels share: their arguments, how chunks are dealt out, and how partial sums meet.
//
// The work is passes x row blocks x chunks along k, in this order: a pass has kTokens columns of y, a row block kChunkRows rows.
// A strip is one row block in one pass. Units 0 .. T - 1 are dealt in order, one range of consecutive units a CTA. A segment is
// the part of a range that lies in one strip. A segment that covers its strip writes y; any other is a partial sum, and the
// last CTA to come to the end of a strip adds them in the order of the ranges. The sums are therefore the same whoever computes
// them, and no CTA ever waits for one that may not have started.
//
// With kTwins 2 a cluster of two CTAs has one range, each of them every other strip of it: the row blocks of twins lie one below
// the other, and x is copied once for both.
//
// With kSplit > 1 clusters share strips: each CTA of a cluster takes a part of a strip's chunks along k, and one of
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

#ifndef SPINFER_TWINS
#define SPINFER_TWINS 1
#endif
constexpr int kTwins = SPINFER_TWINS;

// Whether ranges are as `ranges` says, of about the same cost, or of the same number of units.
#ifndef SPINFER_BY_COST
#define SPINFER_BY_COST 0
#endif
constexpr bool kByCost = SPINFER_BY_COST;
static_assert(!kByCost || (kSplit == 1 && kTwins == 1));

struct MatmulArgs {
  const u8* weight;     // chunks
  const i32* offsets;   // [T + 1], in kOffsetUnit
  const u16* x;         // (tokens, x_stride)
  u16* y;               // (tokens, M)
  const u16* bias;      // [M] or null
  float* partials;      // [2 gridDim.x][kChunkRows kTokens]; with kSplit > 1 not used, nor arrivals
  u32* arrivals;        // [strips], all zero between launches
  const i32* ranges;    // with kByCost: [gridDim.x + 1], the units that they begin with, and the end
  i32 x_stride, tokens;
  i32 mean_chunk;  // its size in 16ths of a byte
  i32 out_features, in_features;
  i32 chunks_k, row_blocks;  // row_blocks: up to a multiple of kTwins
  i32 strips;                // passes x row blocks
  i32 each, extra;           // units a range; the first `extra` ranges take one more
  i32 ring_at, ring, in_flight;  // of the weight, in shared memory; in matmul_portable.cu `ring` is a warp's
  // Of x, likewise: in matmul_sm90.cu a power of two, in matmul_wide_sm90.cu a multiple of the warps along k
  // (tests/test_cuda_boxes.py).
  i32 boxes;
};

struct Range {
  i32 index, begin, end;
};
__device__ __forceinline__ Range range_at(const MatmulArgs& p, i32 index) {
  if constexpr (kByCost) return {index, __ldg(p.ranges + index), __ldg(p.ranges + index + 1)};
  const i32 begin = index * p.each + min(index, p.extra);
  return {index, begin, begin + p.each + (index < p.extra)};
}
__device__ __forceinline__ Range own_range(const MatmulArgs& p) { return range_at(p, static_cast<i32>(blockIdx.x) / kTwins); }
// The range that holds a unit of a strip that this CTA has a part of. There are no more CTAs than units, so none is empty.
__device__ __forceinline__ Range range_of(const MatmulArgs& p, i32 unit) {
  if constexpr (kByCost) {
    Range range = own_range(p);
    while (unit < range.begin) range = range_at(p, range.index - 1);
    while (unit >= range.end) range = range_at(p, range.index + 1);
    return range;
  }
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
      const Range range = own_range(p);
      first_strip = cta % kTwins;
      strip_step = kTwins;
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
  // Whether chunk i, which is the k-th along k, ends a segment.
  __device__ __forceinline__ bool ends_segment(i32 i, i32 k) const { return k + 1 == k_end() || i + 1 >= count; }
};
__device__ __forceinline__ i32 row_block_of(const MatmulArgs& p, i32 strip) { return strip % p.row_blocks; }
__device__ __forceinline__ i32 first_token_of(const MatmulArgs& p, i32 strip) { return strip / p.row_blocks * kTokens; }

constexpr int kBands = kBlocksM * 2;  // of 16 rows, in a chunk
constexpr int kPartialFloats = kChunkRows * kTokens;
constexpr int kPartialVectors = kPartialFloats / 4;
// Partial sums and the like of one fragment: float4 [band][8 tokens][lane].
__device__ __forceinline__ int fragment_index(int band, int n, int lane) { return (band * kTiles + n) * 32 + lane; }
// The first unit of a strip, which its twin shares.
__device__ __forceinline__ i32 first_unit(const MatmulArgs& p, i32 strip) { return strip / kTwins * p.chunks_k; }
__device__ __forceinline__ i64 partials_at(i32 range, i32 strip) {
  return (static_cast<i64>(range) * kTwins + strip % kTwins) * 2 * kPartialVectors;
}
// A range has at most two partial segments: the one it begins in, and the last if another strip begins inside it.
__device__ __forceinline__ int is_second(const MatmulArgs& p, const Range& range, i32 strip) { return range.begin < first_unit(p, strip); }
__device__ __forceinline__ float4* partial_of(const MatmulArgs& p, const Range& range, i32 strip) {
  const i64 at = partials_at(range.index, strip) + is_second(p, range, strip) * kPartialVectors;
  return reinterpret_cast<float4*>(p.partials) + at;
}

// Writes 16 rows x 8 tokens of y. v: rows g, g, g + 8, g + 8; tokens 2 t, 2 t + 1, likewise, for lane 4 g + t.
__device__ __forceinline__ void store_fragment(const MatmulArgs& p, i32 row, i32 token, float4 v, int lane) {
  const int g = lane >> 2, t = lane & 3;
  const float values[2][2] = {{v.x, v.y}, {v.z, v.w}};
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const i32 m = row + half * 8 + g;
    if (m >= p.out_features) continue;
    const float bias = p.bias ? to_float(p.bias[m]) : 0.f;
#pragma unroll
    for (int b = 0; b < 2; b++) {
      const i32 n = token + 2 * t + b;
      if (n < p.tokens) p.y[static_cast<i64>(n) * p.out_features + m] = to_value(values[half][b] + bias);
    }
  }
}

template <int kBandsAWarp>
__device__ __forceinline__ void clear(float (&acc)[kBandsAWarp][kTiles][4]) {
#pragma unroll
  for (int r = 0; r < kBandsAWarp; r++)
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) acc[r][n][i] = 0.f;
}

// Where the partials of a strip are: that of range j of those that have one.
struct Partials {
  const float4 *head, *rest;
  int first, count;  // the first range, and how many

  __device__ __forceinline__ Partials(const MatmulArgs& p, i32 strip) {
    const i32 begin = first_unit(p, strip);
    const Range range = range_of(p, begin);
    first = range.index;
    count = range_of(p, begin + p.chunks_k - 1).index - first + 1;
    head = partial_of(p, range, strip);
    // Ranges after the first begin in this strip, so theirs is the first of their partials.
    rest = reinterpret_cast<const float4*>(p.partials) + partials_at(first, strip);
  }
  __device__ __forceinline__ const float4* of(int j) const { return j ? rest + static_cast<i64>(j) * kTwins * 2 * kPartialVectors : head; }
};

// Leaves the first kOwn tiles of each band; `partial`: the lane's place of the first.
template <int kOwn, int kBandsAWarp>
__device__ __forceinline__ void leave_partial(float4* partial, const float (&acc)[kBandsAWarp][kTiles][4]) {
#pragma unroll
  for (int r = 0; r < kBandsAWarp; r++)
#pragma unroll
    for (int n = 0; n < kOwn; n++) __stcg(partial + (r * kTiles + n) * 32, as_float4(acc[r][n]));
}

// Whether a range has all of a strip.
__device__ __forceinline__ bool covers(const MatmulArgs& p, const Range& range, i32 strip) {
  const i32 first = first_unit(p, strip);
  return range.begin <= first && range.end >= first + p.chunks_k;
}
