// From bitmap to Tensor Core fragments beside wgmmas, which integer MMAs (decode.cuh) would queue behind: prefix sums by shuffles.
#pragma once
#include "common.cuh"
#include "layout.cuh"

// kTiles tiles of 16 x 64 that a warp decodes, of which all but the values themselves is known.
template <int kTiles>
struct OpenTiles {
  u32 mask[kTiles];
  u32 base[kTiles];   // shared address of each tile's values
  u32 at[kTiles][4];  // values before the lane's upper pair in steps 2 s (low half) and 2 s + 1 (high half)

  // Loads what steps 2 s and 2 s + 1 of 8 columns may need: two values for each pair, whether there or not.
  __device__ __forceinline__ void gather(u32 (&raw)[kTiles][8], int s) const {
#pragma unroll
    for (int r = 0; r < kTiles; r++) {
      const u32 y = mask[r] >> (2 * s);
      const u32 even = __dp2a_lo(at[r][s], 0x0002u, base[r]), odd = __dp2a_lo(at[r][s], 0x0200u, base[r]);
      const u32 even_lower = __dp4a(y & 0x01010101u, 0x00000202u, even), odd_lower = __dp4a(y & 0x02020202u, 0x00000101u, odd);
      raw[r][0] = lds_u16<0>(even);
      raw[r][1] = lds_u16<2>(even);
      raw[r][2] = lds_u16<0>(even_lower);
      raw[r][3] = lds_u16<2>(even_lower);
      raw[r][4] = lds_u16<0>(odd);
      raw[r][5] = lds_u16<2>(odd);
      raw[r][6] = lds_u16<0>(odd_lower);
      raw[r][7] = lds_u16<2>(odd_lower);
    }
  }
  // Turns those of tile r into its A fragment.
  __device__ __forceinline__ void select(u32 (&f)[4], const u32 (&raw)[kTiles][8], int r, int s) const {
    const u32 y = mask[r] >> (2 * s);
    const u32 even = y & 0x01010101u, odd = y & 0x02020202u;
    // Selectors as in decode.cuh.
    f[0] = prmt(raw[r][0], raw[r][1], __dp2a_lo(0xDE0043DEu, even, 0x3232u));
    f[1] = prmt(raw[r][2], raw[r][3], __dp2a_hi(0xDE0043DEu, even, 0x3232u));
    f[2] = prmt(raw[r][4], raw[r][5], __dp2a_lo(0x6F0021EFu, odd, 0x3232u));
    f[3] = prmt(raw[r][6], raw[r][7], __dp2a_hi(0x6F0021EFu, odd, 0x3232u));
  }
};

// v of the lanes up to and with this one, `offset` of them more than before.
template <int kOffset>
__device__ __forceinline__ void add_from_below(u32& v) {
  asm volatile(
      "{\n.reg .pred there;\n.reg .b32 below;\nshfl.sync.up.b32 below|there, %0, %1, 0, 0xffffffff;\n"
      "@there add.u32 %0, %0, below;\n}"
      : "+r"(v)
      : "n"(kOffset));
}

// The nonzeros of the lanes before this one in each step, and of all lanes: a byte a step, h steps 4 h to 4 h + 3. 12 shuffles a
// tile and few instructions or 8 and some 9 more: 28672 x 8192 takes 106 us the first way and 109 the second with 16 warps and 64
// tokens, 203 and 192 with 8 warps and 256 (an H200).
template <int kTiles, bool kFewShuffles>
struct LaneScan {
  u32 own[kTiles][2], sum[kTiles][2];  // of the lane; of the lanes up to this one, of which there are at most 128

  __device__ __forceinline__ explicit LaneScan(int) {}
  __device__ __forceinline__ void count(int r, u32 mask) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u32 y0 = mask >> (4 * h), y1 = mask >> (4 * h + 2);
      // Odd steps' bits weigh 2: times 128 they count in the next byte.
      const u32 low = __dp4a(y0 & 0x02020202u, 0x80808080u, __dp4a(y0 & 0x01010101u, 0x01010101u, 0u));
      const u32 high = __dp4a(y1 & 0x02020202u, 0x80808080u, __dp4a(y1 & 0x01010101u, 0x01010101u, 0u));
      own[r][h] = sum[r][h] = high * 0x10000u + low;
    }
  }
  template <int kOffset>
  __device__ __forceinline__ void scan(int r) {
#pragma unroll
    for (int h = 0; h < 2; h++) add_from_below<kOffset>(sum[r][h]);
  }
  __device__ __forceinline__ u32 before(int r, int h) const { return sum[r][h] - own[r][h]; }
  __device__ __forceinline__ u32 total(int r, int h) const { return __shfl_sync(~0u, sum[r][h], 31); }
};
// Lanes exchange what they have in pairs, quads and so on, so that all come to know the totals.
template <int kTiles>
struct LaneScan<kTiles, true> {
  // Of this lane and those it has exchanged with, and of those of them before it: until scan<2> nibbles, which hold no more (byte
  // i: steps i and i + 4), then bytes.
  u32 sum[kTiles][2], below[kTiles][2];
  u32 upper[5];  // 1 where this lane is the upper one of those that exchange at an offset of 1 << i

  __device__ __forceinline__ explicit LaneScan(int lane) {
#pragma unroll
    for (int i = 0; i < 5; i++) {
      upper[i] = lane >> i & 1;
      asm volatile("" : "+r"(upper[i]));  // else the compiler multiplies by it with more instructions
    }
  }
  __device__ __forceinline__ void count(int r, u32 mask) {
    u32 each[4];
#pragma unroll
    for (int s = 0; s < 4; s++) each[s] = __dp4a(mask >> s & 0x11111111u, 0x01010101u, 0u);
    sum[r][0] = (each[3] * 256 + each[2]) * 0x10000u + (each[1] * 256 + each[0]);
    below[r][0] = 0;
  }
  template <int kOffset>
  __device__ __forceinline__ void scan(int r) {
    constexpr int kUpper = kOffset == 1 ? 0 : kOffset == 2 ? 1 : kOffset == 4 ? 2 : kOffset == 8 ? 3 : 4;
    constexpr u32 kLow = 0x0f0f0f0fu;
#pragma unroll
    for (int h = 0; h < (kOffset <= 2 ? 1 : 2); h++) {
      const u32 other = __shfl_xor_sync(~0u, sum[r][h], kOffset);
      below[r][h] += other * upper[kUpper];
      if constexpr (kOffset == 2) {
        sum[r][1] = (sum[r][0] >> 4 & kLow) + (other >> 4 & kLow);
        sum[r][0] = (sum[r][0] & kLow) + (other & kLow);
        below[r][1] = below[r][0] >> 4 & kLow;
        below[r][0] &= kLow;
      } else {
        sum[r][h] += other;
      }
    }
  }
  __device__ __forceinline__ u32 before(int r, int h) const { return below[r][h]; }
  __device__ __forceinline__ u32 total(int r, int h) const { return sum[r][h]; }
};

// Works OpenTiles out in stages: masks and bases (the caller's), count, scan<1> to scan<16>, finish.
template <int kTiles, bool kFewShuffles>
struct TileOpener {
  OpenTiles<kTiles> tiles;
  LaneScan<kTiles, kFewShuffles> counts;

  __device__ __forceinline__ explicit TileOpener(int lane) : counts(lane) {}
  __device__ __forceinline__ void count() {
#pragma unroll
    for (int r = 0; r < kTiles; r++) counts.count(r, tiles.mask[r]);
  }
  template <int kOffset>
  __device__ __forceinline__ void scan() {
#pragma unroll
    for (int r = 0; r < kTiles; r++) counts.template scan<kOffset>(r);
  }
  // All stages, where there is nothing to do between them.
  __device__ __forceinline__ void scan_all() {
    scan<1>();
    scan<2>();
    scan<4>();
    scan<8>();
    scan<16>();
  }
  // Adds the nonzeros of the steps before each.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < kTiles; r++) {
      u32 steps = 0;  // of those before steps 2 s and 2 s + 1
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 total = counts.total(r, h), lanes = counts.before(r, h);
        const u32 first = prmt(lanes, 0, 0x4140u) + prmt(total, 0, 0x4044u), second = prmt(lanes, 0, 0x4342u) + prmt(total, 0, 0x4244u);
        tiles.at[r][2 * h] = steps * 0x10001u + first;
        steps = __dp4a(total, 0x00000101u, steps);
        tiles.at[r][2 * h + 1] = steps * 0x10001u + second;
        steps = __dp4a(total, 0x01010000u, steps);
      }
    }
  }
};
