// How the sums of matmul_wide_sm90.cu become y: added up over the warps along k and the CTAs that share a strip, then written in
// whole lines.
#pragma once
#include "arrivals.cuh"
#include "common.cuh"
#include "layout.cuh"
#include "lines.cuh"
#include "matmul.cuh"
#include "sm90.cuh"

// Which sums a warp has: kBandsAWarp bands of 16 rows, from warp_m kBandsAWarp on, of the columns that are warp_k's.
struct WarpPlace {
  int warp_m, warp_k, lane;
};

__device__ __forceinline__ i32 y_stride_of(const MatmulArgs& p) { return p.out_features; }
__device__ __forceinline__ i32 rows_of(const MatmulArgs& p) { return p.out_features; }

// Adds the partials of the other ranges, as if all were added in the order of the ranges; `mine` is this CTA's place among them.
template <int kOwn, int kBandsAWarp>
__device__ __forceinline__ void add_partials(float (&acc)[kBandsAWarp][kTiles][4], const Partials& partials, int mine, int fragment) {
  // Tiles in flight at a time, as many as registers allow.
  constexpr int kMost = (kOwn > 36 ? 4 : kOwn > 16 ? 8 : 16) / kBandsAWarp, kStep = kOwn < kMost ? kOwn : kMost;
#pragma unroll
  for (int n0 = 0; n0 < kOwn; n0 += kStep) {
    constexpr int kAtOnce = kBandsAWarp * kStep;
    auto at = [&](i32 j, int i) { return partials.of(j) + fragment + (i / kStep * kTiles + n0 + i % kStep) * 32; };
    float4 v[kAtOnce];
    auto load = [&](i32 j) {
#pragma unroll
      for (int i = 0; i < kAtOnce; i++)
        if (n0 + i % kStep < kOwn) v[i] = __ldcg(at(j, i));
    };
    auto add_to_own = [&]() {
#pragma unroll
      for (int i = 0; i < kAtOnce; i++)
        if (n0 + i % kStep < kOwn) add(acc[i / kStep][n0 + i % kStep], v[i]);
    };
    if (mine > 0) {
      load(0);
#pragma unroll 1
      for (int j = 1; j < mine; j++)
#pragma unroll
        for (int i = 0; i < kAtOnce; i++)
          if (n0 + i % kStep < kOwn) add(v[i], __ldcg(at(j, i)));
      add_to_own();
    }
#pragma unroll 1
    for (int j = mine + 1; j < partials.count; j++) {
      load(j);
      add_to_own();
    }
    asm volatile("" ::: "memory");
  }
}
// With an odd number of tiles the last of them is alone; what is stored beside it lies beyond `end`.
template <int kOwn, int kBandsAWarp>
__device__ __forceinline__ void store_sums(const MatmulArgs& p, const float (&acc)[kBandsAWarp][kTiles][4], i32 row, i32 token, u32 lines,
                                           int warp, int lane) {
  const int band = warp % 4 * kBandsAWarp;
  float2 bias[kBandsAWarp];
#pragma unroll
  for (int r = 0; r < kBandsAWarp; r++) bias[r] = bias_of(p, row + (band + r) * 16, lane);
  constexpr int kStep = 2 / kBandsAWarp;
  const i32 end = min(p.tokens, token + kOwn * 8);
#pragma unroll
  for (int n = 0; n < kOwn; n += kStep) {
    const int second = n + kStep - 1 < kOwn ? n + kStep - 1 : n;
    const float4 v[2] = {as_float4(acc[0][n]), as_float4(acc[kBandsAWarp - 1][second])};
    store_lines<kBandsAWarp>(p, row, token + n * 8, end, v, bias, lines + n / kStep % 2 * (kLinesBytes / 2), warp, lane);
  }
}

// Two warps along k exchange halves of their sums: each has the sum of its half of the tokens afterwards, in the first tiles.
template <int kBandsAWarp>
__device__ __forceinline__ void exchange(float (&acc)[kBandsAWarp][kTiles][4], u32 scratch, int band, int warp_k, int lane, int threads) {
  constexpr int kHalf = kTiles / 2, kExchanged = 2 / kBandsAWarp;  // tiles at a time: 1 KB a warp
  static_assert(kTiles % 2 == 0);
  auto at = [&](int to, int r, int j) { return scratch + (((to * kBands + band + r) * kExchanged + j) * 32 + lane) * 16; };
#pragma unroll
  for (int n0 = 0; n0 < kHalf; n0 += kExchanged) {
    named_barrier<1>(threads);  // `scratch` is free
#pragma unroll
    for (int r = 0; r < kBandsAWarp; r++)
#pragma unroll
      for (int j = 0; j < kExchanged && n0 + j < kHalf; j++) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = warp_k ? acc[r][n0 + j][i] : acc[r][kHalf + n0 + j][i];
        sts_float4(at(1 - warp_k, r, j), v);
      }
    named_barrier<1>(threads);
#pragma unroll
    for (int r = 0; r < kBandsAWarp; r++)
#pragma unroll
      for (int j = 0; j < kExchanged && n0 + j < kHalf; j++) {
        float(&c)[4] = acc[r][n0 + j];
#pragma unroll
        for (int i = 0; i < 4; i++) c[i] = warp_k ? acc[r][kHalf + n0 + j][i] : c[i];
        add(c, lds_float4(at(warp_k, r, j)));
      }
  }
}

// Bytes of shared memory that finish_range needs; finish_split has all that x and the weight had.
__device__ constexpr u32 finish_bytes(int warps) { return kSplit > 1 ? 0 : warps / 4 * kLinesBytes; }

// Ends a segment of a range. CTAs leave partial sums but for the last that comes to the end of the strip (arrivals.cuh): it adds them
// to its own, in the order of the ranges, and writes y. All consumer warps call it, and two along k share what there is to do, half
// of the tokens each.
template <int kWarpsM, int kWarpsK, int kBandsAWarp>
__device__ __forceinline__ void finish_range(const MatmulArgs& p, float (&acc)[kBandsAWarp][kTiles][4], i32 strip, u32 scratch, u32 arrivals,
                                             const WarpPlace& place) {
  static_assert(kWarpsK <= 2);
  constexpr int kOwn = kTiles / kWarpsK, kThreads = kWarpsM * kWarpsK * 32;
  const int lane = place.lane, band = place.warp_m * kBandsAWarp, tile = place.warp_k * kOwn;
  const Range range = own_range(p);
  const bool whole = covers(p, range, strip);
  if constexpr (kWarpsK == 2) exchange<kBandsAWarp>(acc, scratch, band, place.warp_k, lane, kThreads);
  const int fragment = fragment_index(band, tile, lane);
  if (whole || adds_up(p, range, strip, arrivals)) {
    if constexpr (kWarpsK == 2) named_barrier<2>(kThreads);  // `scratch` has been read
    if (!whole) {
      const Partials partials(p, strip);
      add_partials<kOwn, kBandsAWarp>(acc, partials, range.index - partials.first, fragment);
    }
    const int warp = place.warp_k * kWarpsM + place.warp_m;
    store_sums<kOwn, kBandsAWarp>(p, acc, row_block_of(p, strip) * kChunkRows + place.warp_m / 4 * 64 * kBandsAWarp,
                                  first_token_of(p, strip) + tile * 8, scratch + warp / 4 * kLinesBytes, warp, lane);
  } else {
    leave_partial<kOwn>(partial_of(p, range, strip) + fragment, acc);
    leaves_sums<kThreads>();
  }
  // Not clear(): the compiler would set other registers to zero beforehand, and spill these.
#pragma unroll
  for (int r = 0; r < kBandsAWarp; r++)
#pragma unroll
    for (int n = 0; n < kTiles; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) asm volatile("mov.f32 %0, 0f00000000;" : "+f"(acc[r][n][i]));
}

// Ends the work of a CTA of a pair, which is one segment. Both leave their sums at `sums`, where x and the weight were; each adds
// those of half of the tokens and writes them. All consumer warps call it.
template <int kWarpsM, int kWarpsK, int kBandsAWarp>
__device__ __forceinline__ void finish_split(const MatmulArgs& p, const float (&acc)[kBandsAWarp][kTiles][4], i32 strip, u32 sums,
                                             const WarpPlace& place) {
  constexpr int kWarps = kWarpsM * kWarpsK, kHalf = kTiles / 2;
  constexpr int kAtOnce = kWarps == 8 && kHalf % 4 == 0 ? 4 : 2, kSteps = (kHalf + kAtOnce - 1) / kAtOnce;
  static_assert(kTiles % 2 == 0);
  const u32 rank = blockIdx.x % kSplit, others = in_cta(sums, rank ^ 1);
  const int lane = place.lane, warp = place.warp_k * kWarpsM + place.warp_m;
  named_barrier<1>(kWarps * 32);  // all of x and the weight has been read
  const u32 own = sums + (place.warp_k * kPartialVectors + fragment_index(place.warp_m * kBandsAWarp, 0, lane)) * 16;
#pragma unroll
  for (int r = 0; r < kBandsAWarp; r++)
#pragma unroll
    for (int n = 0; n < kTiles; n++) sts_float4(own + (r * kTiles + n) * 512, acc[r][n]);
  cluster_arrive();
  cluster_wait();
  auto sum_of = [&](int band, int n) {
    const u32 at = fragment_index(band, n, lane) * 16;
    float4 here[kWarpsK], there[kWarpsK];
#pragma unroll
    for (int k = 0; k < kWarpsK; k++) {
      here[k] = lds_float4(sums + at + k * kPartialVectors * 16);
      there[k] = lds_float4_of_cluster(others + at + k * kPartialVectors * 16);
    }
#pragma unroll
    for (int k = 1; k < kWarpsK; k++) {
      add(here[0], here[k]);
      add(there[0], there[k]);
    }
    add(here[0], there[0]);
    return here[0];
  };
  const i32 rows = row_block_of(p, strip) * kChunkRows, token = first_token_of(p, strip);
  const int first = static_cast<int>(rank) * kHalf;
  const i32 end = min(p.tokens, token + (first + kHalf) * 8);
  const u32 buffer = sums + kWarpsK * kPartialFloats * 4 + warp / 4 * kLinesBytes;
  u32 turn = 0;
#pragma unroll 1
  for (int i = warp / 4; i < kBands / 4 * kSteps; i += kWarps / 4) {
    const int group = i / kSteps * 4, band = group + warp % 4, n = first + i % kSteps * kAtOnce;
    const float2 bias[1] = {bias_of(p, rows + band * 16, lane)};
    // With an odd number of tiles the last of them is alone; what comes after it, or is there twice, lies beyond `end`.
    float4 v[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; j++) v[j] = sum_of(band, min(n + j, kTiles - 1));
#pragma unroll
    for (int j = 0; j < kAtOnce; j += 2) {
      const float4 two[2] = {v[j], v[j + 1]};
      store_lines<1>(p, rows + group * 16, token + (n + j) * 8, end, two, bias, buffer + turn, warp, lane);
      turn ^= kLinesBytes / 2;
    }
  }
  cluster_arrive();  // until the other CTA has read its part
  cluster_wait();
}
