// The AVX2 tier. A byte of a mask picks a shuffle that spreads its values. One or two tokens are multiplied at once; with
// more, a chunk of a panel is decoded into a buffer that stays in L1 and multiplied from there.
#include <immintrin.h>

#include "kernel.h"

namespace spinfer {
namespace {

#include "convert.h"
#include "panels.h"

constexpr int64_t kChunkPairs = 64;  // 16 KiB decoded
// Measured on Zen 4: one distance only is 10 % slower at N = 4, 50 %, where a chunk is decoded between multiplications; all
// of them are 4 % slower at N = 1, where the loop has no time to spare.
constexpr Ahead kAheadDecoded{8192, 2048, 0, 256};
constexpr Ahead kAheadFused{0, 2048, 0, 0};

struct Shuffles {
  alignas(64) uint8_t words[256][16];   // pshufb: the n-th value goes to the n-th set bit, zero elsewhere
  alignas(64) uint8_t dwords[256][8];   // vpermd indices
};

constexpr Shuffles make_shuffles() {
  Shuffles table{};
  for (int byte = 0; byte < 256; ++byte) {
    int next = 0;
    for (int bit = 0; bit < 8; ++bit) {
      const bool set = byte >> bit & 1;
      table.words[byte][2 * bit] = uint8_t(set ? 2 * next : 0x80);
      table.words[byte][2 * bit + 1] = uint8_t(set ? 2 * next + 1 : 0x80);
      table.dwords[byte][bit] = uint8_t(next);
      next += set;
    }
  }
  return table;
}

constexpr Shuffles kShuffles = make_shuffles();

inline __m128i expand8x16(uint32_t byte, const void* from) {
  const __m128i values = _mm_loadu_si128(static_cast<const __m128i*>(from));
  return _mm_shuffle_epi8(values, _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffles.words[byte])));
}

inline __m256 expand8x32(uint32_t byte, const void* from) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(byte)), bits), bits);
  const __m256i index =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kShuffles.dwords[byte])));
  const __m256 spread = _mm256_permutevar8x32_ps(_mm256_loadu_ps(static_cast<const float*>(from)), index);
  return _mm256_and_ps(spread, _mm256_castsi256_ps(set));
}

// Read one mask's values: 2 x 8 rows of the even column and of the odd one, fp32.
inline void decode(const Bf16*& values, uint32_t mask, __m256 even[2], __m256 odd[2]) {
  const __m256i high = _mm256_set1_epi32(int(0xffff0000u));
  for (int i = 0; i < 2; ++i, mask >>= 16) {
    const __m128i rows03 = expand8x16(mask & 0xff, values);
    const __m128i rows47 = expand8x16(mask >> 8 & 0xff, values + _mm_popcnt_u32(mask & 0xff));
    values += _mm_popcnt_u32(mask & 0xffff);
    const __m256i rows = _mm256_inserti128_si256(_mm256_castsi128_si256(rows03), rows47, 1);
    even[i] = _mm256_castsi256_ps(_mm256_slli_epi32(rows, 16));
    odd[i] = _mm256_castsi256_ps(_mm256_and_si256(rows, high));
  }
}

inline void decode(const F16*& values, uint32_t mask, __m256 even[2], __m256 odd[2]) {
  for (int odd_column = 0; odd_column < 2; ++odd_column) {
    __m256* column = odd_column ? odd : even;
    column[0] = _mm256_cvtph_ps(expand8x16(mask & 0xff, values));
    column[1] = _mm256_cvtph_ps(expand8x16(mask >> 8 & 0xff, values + _mm_popcnt_u32(mask & 0xff)));
    values += _mm_popcnt_u32(mask & 0xffff);
    mask >>= 16;
  }
}

inline void decode(const F32*& values, uint32_t mask, __m256 even[2], __m256 odd[2]) {
  for (int odd_column = 0; odd_column < 2; ++odd_column) {
    __m256* column = odd_column ? odd : even;
    column[0] = expand8x32(mask & 0xff, values);
    column[1] = expand8x32(mask >> 8 & 0xff, values + _mm_popcnt_u32(mask & 0xff));
    values += _mm_popcnt_u32(mask & 0xffff);
    mask >>= 16;
  }
}

inline void add_to(float* total, __m256 sum) { _mm256_storeu_ps(total, _mm256_add_ps(_mm256_loadu_ps(total), sum)); }

// One or two tokens, straight from the registers.
template <class Value, int kTokens>
const Value* fused(const Value* values, const uint32_t* masks, int64_t pairs, const float* x, float* totals) {
  __m256 sum[kTokens][4];
  for (auto& token : sum) {
    for (__m256& part : token) part = _mm256_setzero_ps();
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    prefetch(kAheadFused, values, masks + 2 * pair);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m256 even[2], odd[2];
      decode(values, masks[2 * pair + half], even, odd);
#pragma GCC unroll 2
      for (int t = 0; t < kTokens; ++t) {
        const __m256 x_even = _mm256_broadcast_ss(x + t * kRowX + 2 * pair);
        const __m256 x_odd = _mm256_broadcast_ss(x + t * kRowX + 2 * pair + 1);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          __m256& to = sum[t][2 * half + i];
          to = _mm256_fmadd_ps(odd[i], x_odd, _mm256_fmadd_ps(even[i], x_even, to));
        }
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int i = 0; i < 4; ++i) add_to(totals + t * 32 + 8 * i, sum[t][i]);
  }
  return values;
}

// [column][32 rows] of decoded weights, 16 rows at a time, times x.
template <int kTokens>
void multiply(const float* dense, int64_t columns, const float* x, float* totals) {
  for (int half = 0; half < 2; ++half) {
    const float* w = dense + 16 * half;
    __m256 sum[kTokens][2];
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_ps();
    for (int64_t k = 0; k < columns; ++k) {
      const __m256 w0 = _mm256_load_ps(w + 32 * k), w1 = _mm256_load_ps(w + 32 * k + 8);
#pragma GCC unroll 6
      for (int t = 0; t < kTokens; ++t) {
        const __m256 xs = _mm256_broadcast_ss(x + t * kRowX + k);
        sum[t][0] = _mm256_fmadd_ps(w0, xs, sum[t][0]);
        sum[t][1] = _mm256_fmadd_ps(w1, xs, sum[t][1]);
      }
    }
#pragma GCC unroll 6
    for (int t = 0; t < kTokens; ++t) {
      add_to(totals + t * 32 + 16 * half, sum[t][0]);
      add_to(totals + t * 32 + 16 * half + 8, sum[t][1]);
    }
  }
}

constexpr int kMaxTokens = 6;  // 2 x 6 sums, 2 weights, 1 broadcast of 16 registers

struct Avx2 {
  static void load(float* to, const void* from, int type, int64_t n) {
    const uint16_t* half = static_cast<const uint16_t*>(from);
    int64_t i = 0;
    if (type == SPINFER_BF16) {
      for (; i < n; ++i) to[i] = float_of_bf16(half[i]);
    } else if (type == SPINFER_F16) {
      for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i))));
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
      for (; i < n; ++i) half[i] = bf16_of_float(from[i]);
    } else if (type == SPINFER_F16) {
      for (; i + 8 <= n; i += 8) {
        const __m128i rounded = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i), rounded);
      }
      for (; i < n; ++i) half[i] = f16_of_float(from[i]);
    } else {
      __builtin_memcpy(to, from, size_t(n) * 4);
    }
  }

  template <class Value>
  static const Value* block(const Value* values, const uint32_t* masks, int64_t pairs, const float* x, int64_t tokens,
                            float* totals) {
    if (tokens == 1) return fused<Value, 1>(values, masks, pairs, x, totals);
    if (tokens == 2) return fused<Value, 2>(values, masks, pairs, x, totals);

    static constexpr void (*kMultiply[kMaxTokens])(const float*, int64_t, const float*, float*) = {
        multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>,
    };
    alignas(64) float dense[kChunkPairs * 64];
    for (int64_t start = 0; start < pairs; start += kChunkPairs) {
      const int64_t n = lesser(kChunkPairs, pairs - start);
      for (int64_t pair = 0; pair < n; ++pair) {
        prefetch(kAheadDecoded, values, masks + 2 * (start + pair));
        for (int half = 0; half < 2; ++half) {
          __m256 even[2], odd[2];
          decode(values, masks[2 * (start + pair) + half], even, odd);
          float* to = dense + pair * 64 + half * 16;
          _mm256_store_ps(to, even[0]);
          _mm256_store_ps(to + 8, even[1]);
          _mm256_store_ps(to + 32, odd[0]);
          _mm256_store_ps(to + 40, odd[1]);
        }
      }
      in_parts(tokens, kMaxTokens, [&](int64_t token, int64_t size) {
        kMultiply[size - 1](dense, 2 * n, x + token * kRowX + 2 * start, totals + token * 32);
      });
    }
    return values;
  }
};

bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("popcnt");
}

}  // namespace

const Tier kAvx2 = {"avx2", supported, keeps_fp32, prepare_fp32<Avx2>, run_by_type<Avx2>, nullptr, nullptr};

}  // namespace spinfer
