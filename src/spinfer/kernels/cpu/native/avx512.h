// What the AVX-512 tiers share. Values are expanded in registers (vpexpandw, vpexpandd) and multiplied at once, or, for
// more tokens than registers take, from a small decoded chunk. A lane is a row: no sums across lanes, and x is a
// broadcast. With SPINFER_BF16_TIER set, bf16 values times bf16 activations run on vdpbf16ps.
#pragma once
#include <immintrin.h>

#include "kernel.h"

namespace spinfer {
namespace {

#include "convert.h"
#include "panels.h"

// Measured on the CPU whose default the tier is (4096 x 4096, cold weights): Zen 4 for avx512bf16, Golden Cove for avx512.
// kChunkNbytes are decoded at a time for many tokens.
#ifdef SPINFER_BF16_TIER
constexpr Ahead kAhead{12288, 4096, 4096, 512};
constexpr int64_t kChunkNbytes = 32 << 10;
#else
constexpr Ahead kAhead{8192, 2048, 0, 256};
constexpr int64_t kChunkNbytes = 8 << 10;
#endif

// vpexpandw and vpexpandd depend on their destination even when they zero it (Zen 4); clearing it first costs nothing.
// The mask comes from a general register, which popcnt needs anyway: kmovd from memory takes a load slot more, 7 % of the
// time at N = 1 (Zen 4).
inline __m512i expand16(uint32_t mask, const void* from) {
  __m512i out;
  __mmask32 k;
  asm("kmovd %2, %1\n\tvpxord %0, %0, %0\n\tvpexpandw %3, %0%{%1%}%{z%}"
      : "=&v"(out), "=&Yk"(k)
      : "r"(mask), "v"(_mm512_loadu_si512(from)));
  return out;
}

inline __m512 expand32(__mmask16 mask, const void* from) {
  __m512 out;
  asm("vpxord %0, %0, %0\n\tvpexpandd %2, %0%{%1%}%{z%}" : "=&v"(out) : "Yk"(mask), "v"(_mm512_loadu_si512(from)));
  return out;
}

// Read one mask's values: the 16 rows of the even column and of the odd one, fp32.
inline void decode(const Bf16*& values, uint32_t mask, __m512& even, __m512& odd) {
  const __m512i pair = expand16(mask, values);
  values += _mm_popcnt_u32(mask);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(int(0xffff0000u))));
}

inline void decode(const F16*& values, uint32_t mask, __m512& even, __m512& odd) {
  const __m512i both = expand16(mask, values);
  values += _mm_popcnt_u32(mask);
  even = _mm512_cvtph_ps(_mm512_castsi512_si256(both));
  odd = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
}

inline void decode(const F32*& values, uint32_t mask, __m512& even, __m512& odd) {
  even = expand32(__mmask16(mask), values);
  values += _mm_popcnt_u32(mask & 0xffff);
  odd = expand32(__mmask16(mask >> 16), values);
  values += _mm_popcnt_u32(mask >> 16);
}

inline void add_to(float* total, __m512 sum) { _mm512_storeu_ps(total, _mm512_add_ps(_mm512_loadu_ps(total), sum)); }

// `kTokens` tokens at once. With one or two, even and odd columns have sums of their own: one chain of FMAs would be
// slower than the memory. With kStore the decoded pairs are also written to `dense`, for `multiply`.
template <class Value, int kTokens, bool kStore>
const Value* tokens_block(const Value* values, const uint32_t* masks, int64_t pairs, const float* x, float* totals,
                          float* dense) {
  constexpr int kChains = kTokens <= 2 ? 2 : 1;
  __m512 first[kTokens][kChains], last[kTokens][kChains];
#pragma GCC unroll 12
  for (int t = 0; t < kTokens; ++t) {
    for (int c = 0; c < kChains; ++c) first[t][c] = last[t][c] = _mm512_setzero_ps();
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    __m512 even0, odd0, even1, odd1;
    prefetch(kAhead, values, masks + 2 * pair);
    decode(values, masks[2 * pair], even0, odd0);
    decode(values, masks[2 * pair + 1], even1, odd1);
    if constexpr (kStore) {
      _mm512_store_ps(dense + pair * 64, even0);
      _mm512_store_ps(dense + pair * 64 + 16, even1);
      _mm512_store_ps(dense + pair * 64 + 32, odd0);
      _mm512_store_ps(dense + pair * 64 + 48, odd1);
    }
#pragma GCC unroll 12
    for (int t = 0; t < kTokens; ++t) {
      const __m512 x_even = _mm512_set1_ps(x[t * kRowX + 2 * pair]);
      const __m512 x_odd = _mm512_set1_ps(x[t * kRowX + 2 * pair + 1]);
      first[t][0] = _mm512_fmadd_ps(even0, x_even, first[t][0]);
      last[t][0] = _mm512_fmadd_ps(even1, x_even, last[t][0]);
      first[t][kChains - 1] = _mm512_fmadd_ps(odd0, x_odd, first[t][kChains - 1]);
      last[t][kChains - 1] = _mm512_fmadd_ps(odd1, x_odd, last[t][kChains - 1]);
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < kTokens; ++t) {
    for (int c = 0; c < kChains; ++c) {
      add_to(totals + t * 32, first[t][c]);
      add_to(totals + t * 32 + 16, last[t][c]);
    }
  }
  return values;
}

#ifdef SPINFER_BF16_TIER
// Both columns of a pair at column `column` of a row of x, in every lane.
inline __m512bh broadcast_pair(const uint16_t* x, int64_t column) {
  int32_t both;
  __builtin_memcpy(&both, x + column, 4);
  return (__m512bh)_mm512_set1_epi32(both);
}

// With one token, every other pair has sums of its own: vdpbf16ps takes 6 cycles, and a pair should take as many (Zen 4).
template <class Value, int kTokens, bool kStore>
const Value* tokens_block(const Value* values, const uint32_t* masks, int64_t pairs, const uint16_t* x, float* totals,
                          uint32_t* dense) {
  constexpr int kChains = kTokens == 1 ? 2 : 1;
  __m512 first[kTokens][kChains], last[kTokens][kChains];
#pragma GCC unroll 12
  for (int t = 0; t < kTokens; ++t) {
    for (int c = 0; c < kChains; ++c) first[t][c] = last[t][c] = _mm512_setzero_ps();
  }
  const auto multiply_pair = [&](int64_t pair, int chain) __attribute__((always_inline)) {
    prefetch(kAhead, values, masks + 2 * pair);
    const __m512i w0 = expand16(masks[2 * pair], values);
    values += _mm_popcnt_u32(masks[2 * pair]);
    const __m512i w1 = expand16(masks[2 * pair + 1], values);
    values += _mm_popcnt_u32(masks[2 * pair + 1]);
    if constexpr (kStore) {
      _mm512_store_si512(dense + pair * 32, w0);
      _mm512_store_si512(dense + pair * 32 + 16, w1);
    }
#pragma GCC unroll 12
    for (int t = 0; t < kTokens; ++t) {
      const __m512bh xs = broadcast_pair(x, t * kRowX + 2 * pair);
      first[t][chain] = _mm512_dpbf16_ps(first[t][chain], (__m512bh)w0, xs);
      last[t][chain] = _mm512_dpbf16_ps(last[t][chain], (__m512bh)w1, xs);
    }
  };
  int64_t pair = 0;
  for (; pair + kChains <= pairs; pair += kChains) {
#pragma GCC unroll 2
    for (int c = 0; c < kChains; ++c) multiply_pair(pair + c, c);
  }
  if (pair < pairs) multiply_pair(pair, 0);
#pragma GCC unroll 12
  for (int t = 0; t < kTokens; ++t) {
    for (int c = 0; c < kChains; ++c) {
      add_to(totals + t * 32, first[t][c]);
      add_to(totals + t * 32 + 16, last[t][c]);
    }
  }
  return values;
}
#endif

// 2 x 12 sums, 4 weights and 2 broadcasts fill the 32 registers.
constexpr int kMaxTokens = 12;

template <class Value, class Dense, class X>
using TokensBlock = const Value* (*)(const Value*, const uint32_t*, int64_t, const X*, float*, Dense*);

template <class Value, class Dense, class X>
const Value* all_tokens(const Value* values, const uint32_t* masks, int64_t pairs, const X* x, int64_t tokens,
                        float* totals) {
  static constexpr TokensBlock<Value, Dense, X> kBlocks[kMaxTokens] = {
      tokens_block<Value, 1, false>,  tokens_block<Value, 2, false>,  tokens_block<Value, 3, false>,
      tokens_block<Value, 4, false>,  tokens_block<Value, 5, false>,  tokens_block<Value, 6, false>,
      tokens_block<Value, 7, false>,  tokens_block<Value, 8, false>,  tokens_block<Value, 9, false>,
      tokens_block<Value, 10, false>, tokens_block<Value, 11, false>, tokens_block<Value, 12, false>,
  };
  return kBlocks[tokens - 1](values, masks, pairs, x, totals, nullptr);
}

// Decoded weights, [column][32 rows] in fp32, times x.
template <int kTokens>
void multiply(const float* dense, int64_t pairs, const float* x, float* totals) {
  __m512 first[kTokens], last[kTokens];
#pragma GCC unroll 12
  for (int t = 0; t < kTokens; ++t) first[t] = last[t] = _mm512_setzero_ps();
  for (int64_t k = 0; k < 2 * pairs; ++k) {
    const __m512 w0 = _mm512_load_ps(dense + 32 * k), w1 = _mm512_load_ps(dense + 32 * k + 16);
#pragma GCC unroll 12
    for (int t = 0; t < kTokens; ++t) {
      const __m512 xs = _mm512_set1_ps(x[t * kRowX + k]);
      first[t] = _mm512_fmadd_ps(w0, xs, first[t]);
      last[t] = _mm512_fmadd_ps(w1, xs, last[t]);
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < kTokens; ++t) {
    add_to(totals + t * 32, first[t]);
    add_to(totals + t * 32 + 16, last[t]);
  }
}

#ifdef SPINFER_BF16_TIER
// The same, [pair][32 rows] of both columns in bf16.
template <int kTokens>
void multiply(const uint32_t* dense, int64_t pairs, const uint16_t* x, float* totals) {
  __m512 first[kTokens], last[kTokens];
#pragma GCC unroll 12
  for (int t = 0; t < kTokens; ++t) first[t] = last[t] = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const __m512bh w0 = (__m512bh)_mm512_load_si512(dense + 32 * pair);
    const __m512bh w1 = (__m512bh)_mm512_load_si512(dense + 32 * pair + 16);
#pragma GCC unroll 12
    for (int t = 0; t < kTokens; ++t) {
      const __m512bh xs = broadcast_pair(x, t * kRowX + 2 * pair);
      first[t] = _mm512_dpbf16_ps(first[t], w0, xs);
      last[t] = _mm512_dpbf16_ps(last[t], w1, xs);
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < kTokens; ++t) {
    add_to(totals + t * 32, first[t]);
    add_to(totals + t * 32 + 16, last[t]);
  }
}
#endif

// Many tokens: decode a chunk once, while the first of them are multiplied, and multiply the others from there.
// Expanding it again for every kMaxTokens tokens instead is 10 % slower at 16 tokens, 18 % at 64 and 60 % at 512 (Golden
// Cove, FMA).
template <class Value, class Dense, class X>
const Value* decoded(const Value* values, const uint32_t* masks, int64_t pairs, const X* x, int64_t tokens,
                     float* totals) {
  constexpr int64_t kLeast = kMaxTokens / 2 + 1;  // of the first part, the largest of more than kMaxTokens tokens
  static constexpr TokensBlock<Value, Dense, X> kFirst[] = {
      tokens_block<Value, 7, true>,  tokens_block<Value, 8, true>,  tokens_block<Value, 9, true>,
      tokens_block<Value, 10, true>, tokens_block<Value, 11, true>, tokens_block<Value, 12, true>,
  };
  static constexpr void (*kMultiply[kMaxTokens])(const Dense*, int64_t, const X*, float*) = {
      multiply<1>, multiply<2>, multiply<3>, multiply<4>,  multiply<5>,  multiply<6>,
      multiply<7>, multiply<8>, multiply<9>, multiply<10>, multiply<11>, multiply<12>,
  };
  constexpr int64_t kPair = 16 * sizeof(X);  // elements of a decoded pair: 64 in fp32, 32 pairs of bf16
  constexpr int64_t kChunkPairs = kChunkNbytes / (kPair * sizeof(Dense));
  alignas(64) Dense dense[kChunkPairs * kPair];
  for (int64_t start = 0; start < pairs; start += kChunkPairs) {
    const int64_t n = lesser(kChunkPairs, pairs - start);
    in_parts(tokens, kMaxTokens, [&](int64_t token, int64_t size) {
      const X* of_part = x + token * kRowX + 2 * start;
      if (token == 0) {
        values = kFirst[size - kLeast](values, masks + 2 * start, n, of_part, totals, dense);
      } else {
        kMultiply[size - 1](dense, n, of_part, totals + token * 32);
      }
    });
  }
  return values;
}

// As bf16_of_float; vcvtneps2bf16 would take subnormals for zero.
inline __m256i bf16_of_floats(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(quiet, 16));
}

struct Avx512 {
  static void load(float* to, const void* from, int type, int64_t n) {
    const uint16_t* half = static_cast<const uint16_t*>(from);
    int64_t i = 0;
    if (type == SPINFER_BF16) {
      for (; i < n; ++i) to[i] = float_of_bf16(half[i]);
    } else if (type == SPINFER_F16) {
      for (; i + 16 <= n; i += 16) {
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half + i))));
      }
      for (; i < n; ++i) to[i] = float_of_f16(half[i]);
    } else {
      __builtin_memcpy(to, from, size_t(n) * 4);
    }
  }

  static void store(void* to, const float* from, int type, int64_t n) {
    uint16_t* half = static_cast<uint16_t*>(to);
    int64_t i = 0;
    if (type == SPINFER_BF16) {
      for (; i + 16 <= n; i += 16) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(half + i), bf16_of_floats(_mm512_loadu_ps(from + i)));
      }
      for (; i < n; ++i) half[i] = bf16_of_float(from[i]);
    } else if (type == SPINFER_F16) {
      for (; i + 16 <= n; i += 16) {
        const __m256i rounded = _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(half + i), rounded);
      }
      for (; i < n; ++i) half[i] = f16_of_float(from[i]);
    } else {
      __builtin_memcpy(to, from, size_t(n) * 4);
    }
  }

  template <class Value>
  static const Value* block(const Value* values, const uint32_t* masks, int64_t pairs, const float* x, int64_t tokens,
                            float* totals) {
    if (tokens > kMaxTokens) return decoded<Value, float>(values, masks, pairs, x, tokens, totals);
    return all_tokens<Value, float>(values, masks, pairs, x, tokens, totals);
  }

#ifdef SPINFER_BF16_TIER
  template <class Value>
  static const Value* block_bf16(const Value* values, const uint32_t* masks, int64_t pairs, const uint16_t* x,
                                 int64_t tokens, float* totals) {
    if (tokens > kMaxTokens) return decoded<Value, uint32_t>(values, masks, pairs, x, tokens, totals);
    return all_tokens<Value, uint32_t>(values, masks, pairs, x, tokens, totals);
  }
#endif
};

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("popcnt");
}

}  // namespace
}  // namespace spinfer
