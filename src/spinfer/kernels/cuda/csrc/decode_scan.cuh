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

// Works OpenTiles out in stages: masks and bases (the caller's), count, scan<1> to scan<16>, finish.
template <int kTiles>
struct TileOpener {
  OpenTiles<kTiles> tiles;
  u32 own[kTiles][2];  // nonzeros of the lane, a byte a step
  u32 sum[kTiles][2];  // those of the lanes up to this one, of which there are at most 128

  __device__ __forceinline__ void count() {
#pragma unroll
    for (int r = 0; r < kTiles; r++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 y0 = tiles.mask[r] >> (4 * h), y1 = tiles.mask[r] >> (4 * h + 2);
        // Odd steps' bits weigh 2: times 128 they count in the next byte.
        const u32 low = __dp4a(y0 & 0x02020202u, 0x80808080u, __dp4a(y0 & 0x01010101u, 0x01010101u, 0u));
        const u32 high = __dp4a(y1 & 0x02020202u, 0x80808080u, __dp4a(y1 & 0x01010101u, 0x01010101u, 0u));
        own[r][h] = sum[r][h] = high * 0x10000u + low;
      }
  }
  template <int kOffset>
  __device__ __forceinline__ void scan() {
#pragma unroll
    for (int r = 0; r < kTiles; r++)
#pragma unroll
      for (int h = 0; h < 2; h++) add_from_below<kOffset>(sum[r][h]);
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
      u32 before = 0;  // of steps 2 s and 2 s + 1
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 total = __shfl_sync(~0u, sum[r][h], 31);
        const u32 lanes = sum[r][h] - own[r][h];
        const u32 first = prmt(lanes, 0, 0x4140u) + prmt(total, 0, 0x4044u), second = prmt(lanes, 0, 0x4342u) + prmt(total, 0, 0x4244u);
        tiles.at[r][2 * h] = before * 0x10001u + first;
        before = __dp4a(total, 0x00000101u, before);
        tiles.at[r][2 * h + 1] = before * 0x10001u + second;
        before = __dp4a(total, 0x01010000u, before);
      }
    }
  }
};
