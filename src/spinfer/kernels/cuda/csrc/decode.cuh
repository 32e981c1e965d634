// From bitmap to Tensor Core fragments: the prefix sums that place each lane's values run on the Tensor Cores themselves.
//
// POPC runs at 16 lanes a clock and SHFL shares the pipe of LDS, so neither can keep up with HBM; the integer MMAs can.
//   1. b1 and.popc MMA: nonzeros of each step in each quad of lanes (StepCounter);
//   2. u8 MMA with a triangular A: exclusive prefix over quads (rows 0-7) and totals (rows 8-15) of each step;
//   3. per 16 columns, u8 MMA: base + 2 (prefix of the quad in this step + totals of the steps before), as what is added to
//      that of the 16 columns before;
//   4. per 16 columns, u8 MMA: + 2 (lanes before this one in the quad): byte addresses of the upper row half's pairs.
// The lower half's pair follows its lane's upper one; an MMA costs 4 to 6 issue slots (docs/kernel.md), so an IDP.4A for each of
// its four addresses is cheaper. Each pair is then two 16-bit shared loads and one PRMT, whose selector is linear in the two mask
// bits.
#pragma once
#include "common.cuh"
#include "layout.cuh"

struct BlockState {
  u32 mask[2];    // of the two tiles
  u32 prefix[2];  // bytes: quad prefix of steps 2 t, 2 t + 1; totals of steps 2 t, 2 t + 1
  u32 base[2];    // shared address of each tile's values
  // Of the two steps of 8 columns and both tiles that were located last: where the values of the lane's quad begin, where its
  // upper pair's are, and its mask, [tile][step].
  Int4 quad, upper;
  u32 bits[2][2];
};

// Counts the nonzeros of each step in each quad of lanes: lane (g, t) gets those of step g in quads 2 t and 2 t + 1.
#ifndef SPINFER_B1_MMA
#define SPINFER_B1_MMA (__CUDA_ARCH__ < 1000)  // else the compiler makes a call of it: 45 instructions, 4 u8 MMAs among them
#endif
struct StepCounter {
#if SPINFER_B1_MMA
  u32 step_bits;
  __device__ __forceinline__ explicit StepCounter(int g) : step_bits(0x01010101u << g) {}
  __device__ __forceinline__ void keep() { asm volatile("" : "+r"(step_bits)); }
  __device__ __forceinline__ Int2 operator()(u32 mask) const { return bmma_and_popc(step_bits, mask); }
#else
  // Row g of A takes step g: byte g % 4 of each lane's counts, of the first 16 of K or the last.
  u32 low, high;
  __device__ __forceinline__ explicit StepCounter(int g) : low(g < 4 ? 1u << 8 * g : 0), high(g < 4 ? 0 : 1u << 8 * (g - 4)) {}
  __device__ __forceinline__ void keep() { asm volatile("" : "+r"(low), "+r"(high)); }
  __device__ __forceinline__ Int2 operator()(u32 mask) const {
    // Of this lane, 0 to 4 each: step s in the low half of byte s, step s + 4 in the high one.
    u32 counts[4];
#pragma unroll
    for (int s = 0; s < 4; s++) counts[s] = __dp4a(mask >> s & 0x11111111u, 0x01010101u, 0u);
    const u32 all = prmt(prmt(counts[0], counts[1], 0x0040), prmt(counts[2], counts[3], 0x0040), 0x5410);
    const Int4 sums = imma_k32(low, 0, high, 0, all & 0x0f0f0f0fu, all >> 4 & 0x0f0f0f0fu, {0, 0, 0, 0});
    return {sums.a, sums.b};
  }
#endif
};

// kAhead: whether values are located 16 columns ahead. 1 % faster at 8 tokens and 2 % at 24; at 16 and 32 registers are short.
template <bool kAhead>
struct BlockDecoder {
  StepCounter counter;
  u32 triangle, ones;
  u32 within0, within1;
  u32 place[4];
  u32 select_even, select_odd, select_none;

  __device__ __forceinline__ explicit BlockDecoder(int lane) : counter(lane >> 2) {
    const int g = lane >> 2, t = lane & 3;
    triangle = (2 * t < g ? 1u : 0u) | (2 * t + 1 < g ? 0x100u : 0u);
    ones = 0x0101u;
    // Column g of B serves quad lane g / 2 and step parity g % 2. Bits of even steps weigh 1, of odd ones 2; times 2 or 1
    // both give the two bytes a value takes.
    within0 = (!(g & 1) && t < (g >> 1)) ? 0x02020202u : 0u;
    within1 = ((g & 1) && t < (g >> 1)) ? 0x01010101u : 0u;
#pragma unroll
    for (int s = 0; s < 4; s++) {
      // Lane t holds {prefix of step 2 t, of 2 t + 1, total of 2 t, of 2 t + 1}; 2 of each prefix of this step, less those of two
      // steps before, and 2 of the totals of the two steps between.
      auto weights = [&](int step, int total_before) {
        const bool even = 2 * t == step, odd = 2 * t + 1 == step;
        return (even ? 2u : 0u) | (odd ? 0x200u : 0u) | (2 * t < total_before ? 0x20000u : 0u) |
               (2 * t + 1 < total_before ? 0x2000000u : 0u);
      };
      const int step = 2 * s + (g & 1);
      place[s] = weights(step, step);
      if (s) place[s] = __vsub4(place[s], weights(step - 2, step - 2));
      asm volatile("" : "+r"(place[s]));
    }
    // PRMT selector: 0x3232 takes zeros only; + 0x43DE for the first bit, - 0x2200 for the second. Odd steps' bits weigh 2.
    select_even = 0xDE0043DEu;
    select_odd = 0x6F0021EFu;
    select_none = 0x3232u;
    // Keeps the compiler from computing these again in the loop.
    counter.keep();
    asm volatile("" : "+r"(triangle), "+r"(ones), "+r"(within0), "+r"(within1));
    asm volatile("" : "+r"(select_even), "+r"(select_odd), "+r"(select_none));
  }

  // Reads a block's header and masks. chunk: shared address of the chunk; thread: 32 index of the block in it + lane.
  __device__ __forceinline__ void load(BlockState& state, u32 chunk, int thread) const {
    const u32 header = lds_u32(chunk + thread / 32 * 4);
    const uint2 masks = lds_v2(chunk + kHeaderBytes + thread * 8);
    state.base[0] = chunk + kValuesAt + (header & 0xffffu);
    state.base[1] = chunk + kValuesAt + (header >> 16);
    state.mask[0] = masks.x;
    state.mask[1] = masks.y;
  }
  // Works out its prefix sums.
  __device__ __forceinline__ void open(BlockState& state) const {
    const Int4 none = {0, 0, 0, 0};
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const Int2 counts = counter(state.mask[r]);
      const u32 pair = static_cast<u32>(counts.a) + static_cast<u32>(counts.b) * 0x100u;
      const Int4 sums = imma_k16(triangle, ones, pair, none);
      state.prefix[r] = static_cast<u32>(sums.a) + static_cast<u32>(sums.b) * 0x100u +
                        static_cast<u32>(sums.c) * 0x10000u + static_cast<u32>(sums.d) * 0x1000000u;
    }
    if (kAhead) locate(state, 0);
  }

  // Works out where values of columns 16 s .. 16 s + 15 are; s is a constant in an unrolled loop, and counts up from 0.
  __device__ __forceinline__ void locate(BlockState& state, int s) const {
    const u32 y0 = state.mask[0] >> (2 * s), y1 = state.mask[1] >> (2 * s);
    u32(&bits)[2][2] = state.bits;
    bits[0][0] = y0 & 0x01010101u;
    bits[0][1] = y0 & 0x02020202u;
    bits[1][0] = y1 & 0x01010101u;
    bits[1][1] = y1 & 0x02020202u;
    if (s == 0) {
      const i32 base0 = static_cast<i32>(state.base[0]), base1 = static_cast<i32>(state.base[1]);
      state.quad = {base0, base0, base1, base1};
    }
    state.quad = imma_k16(state.prefix[0], state.prefix[1], place[s], state.quad);
    state.upper = imma_k32(bits[0][0], bits[1][0], bits[0][1], bits[1][1], within0, within1, state.quad);
  }
  // A fragments of both tiles for columns 16 s .. 16 s + 15, which have been located; then locates the next ones.
  __device__ __forceinline__ void fragments(u32 (&a)[2][4], BlockState& state, int s) const {
    if (!kAhead) locate(state, s);
    const Int4 upper = state.upper;
    const u32 bits[2][2] = {{state.bits[0][0], state.bits[0][1]}, {state.bits[1][0], state.bits[1][1]}};
    if (kAhead && s < 3) locate(state, s + 1);
#pragma unroll
    for (int r = 0; r < 2; r++) {
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const u32 at_upper = r ? (e ? upper.d : upper.c) : (e ? upper.b : upper.a);
        const u32 at_lower = __dp4a(bits[r][e], e ? 0x0101u : 0x0202u, at_upper);
        const u32 scale = e ? select_odd : select_even;
        const u32 select_upper = __dp2a_lo(scale, bits[r][e], select_none);
        const u32 select_lower = __dp2a_hi(scale, bits[r][e], select_none);
        const u32 u0 = lds_u16<0>(at_upper), u1 = lds_u16<2>(at_upper);
        const u32 l0 = lds_u16<0>(at_lower), l1 = lds_u16<2>(at_lower);
        a[r][2 * e] = prmt(u0, u1, select_upper);
        a[r][2 * e + 1] = prmt(l0, l1, select_lower);
      }
    }
  }
};
