// Packing with AVX-512: expand the words of the bitmap, transpose, compress by the masks. 16-bit values are transposed in
// registers, 32-bit ones by gathers from a small buffer.
#include <immintrin.h>

#include "kernel.h"

namespace spinfer {
namespace {

inline __mmask32 lowest(int n) { return _bzhi_u32(0xffffffffu, unsigned(n)); }

// The next values, of which there are as many as bits in `word`; nothing beyond them is read.
inline __m512i expand(const uint16_t*& from, uint32_t word) {
  const int n = _mm_popcnt_u32(word);
  const __m512i values = _mm512_maskz_loadu_epi16(lowest(n), from);
  from += n;
  return _mm512_maskz_expand_epi16(word, values);
}

// For 4 rows x 8 columns in row order: the index that brings pair j of the columns to the j-th 128 bits, there in the order
// of the masks.
inline __m512i pair_index(bool interleaved) {
  alignas(64) uint16_t index[32];
  for (int pair = 0; pair < 4; ++pair) {
    for (int row = 0; row < 4; ++row) {
      for (int parity = 0; parity < 2; ++parity) {
        index[pair * 8 + (interleaved ? 2 * row + parity : 4 * parity + row)] = uint16_t(row * 8 + 2 * pair + parity);
      }
    }
  }
  return _mm512_load_si512(index);
}

// The 16 mask bits of pair j from an 8 x 8 word (see pack.cpp).
template <bool kInterleaved>
inline uint32_t mask_of(uint64_t upper, uint64_t lower, int j) {
  if (kInterleaved) {
    const uint64_t pick = 0x0303030303030303u << (2 * j);
    return uint32_t(_pext_u64(upper, pick) | _pext_u64(lower, pick) << 16);
  }
  const uint64_t even = 0x0101010101010101u << (2 * j), odd = even << 1;
  return uint32_t(_pext_u64(upper, even) | _pext_u64(lower, even) << 8 | _pext_u64(upper, odd) << 16 |
                  _pext_u64(lower, odd) << 24);
}

template <bool kInterleaved>
const uint16_t* pack_panel(const uint16_t* from, const uint64_t* words, int64_t pairs, uint16_t*& to, uint32_t* masks) {
  const __m512i index = pair_index(kInterleaved);
  const __m512i by_column = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  __m512i dense[32][2];
  uint32_t mask[32][2];
  for (int half = 0; half < 2; ++half) {
    for (int block = 0; block < 8; ++block) {  // 16 rows x 8 columns: two words
      const uint64_t upper = words[half * 16 + block * 2], lower = words[half * 16 + block * 2 + 1];
      const __m512i r0 = _mm512_permutexvar_epi16(index, expand(from, uint32_t(upper)));
      const __m512i r4 = _mm512_permutexvar_epi16(index, expand(from, uint32_t(upper >> 32)));
      const __m512i r8 = _mm512_permutexvar_epi16(index, expand(from, uint32_t(lower)));
      const __m512i r12 = _mm512_permutexvar_epi16(index, expand(from, uint32_t(lower >> 32)));
      const __m512i even0 = _mm512_shuffle_i32x4(r0, r4, 0x88), even1 = _mm512_shuffle_i32x4(r8, r12, 0x88);
      const __m512i odd0 = _mm512_shuffle_i32x4(r0, r4, 0xdd), odd1 = _mm512_shuffle_i32x4(r8, r12, 0xdd);
      const __m512i pair[4] = {
          _mm512_shuffle_i32x4(even0, even1, 0x88),
          _mm512_shuffle_i32x4(odd0, odd1, 0x88),
          _mm512_shuffle_i32x4(even0, even1, 0xdd),
          _mm512_shuffle_i32x4(odd0, odd1, 0xdd),
      };
      for (int j = 0; j < 4; ++j) {
        dense[4 * block + j][half] = kInterleaved ? pair[j] : _mm512_permutexvar_epi64(by_column, pair[j]);
        mask[4 * block + j][half] = mask_of<kInterleaved>(upper, lower, j);
      }
    }
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    for (int half = 0; half < 2; ++half) {
      const uint32_t bits = mask[pair][half];
      const int n = _mm_popcnt_u32(bits);
      _mm512_mask_storeu_epi16(to, lowest(n), _mm512_maskz_compress_epi16(bits, dense[pair][half]));
      to += n;
      masks[2 * pair + half] = bits;
    }
  }
  return from;
}

const uint32_t* pack_panel(const uint32_t* from, const uint64_t* words, int64_t pairs, uint32_t*& to, uint32_t* masks) {
  const __m512i by_row = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
  __m512i dense[64][2];  // [column][half]: 16 rows
  uint32_t mask[32][2];
  for (int half = 0; half < 2; ++half) {
    for (int block = 0; block < 8; ++block) {  // 16 rows x 8 columns: two words
      const uint64_t upper = words[half * 16 + block * 2], lower = words[half * 16 + block * 2 + 1];
      alignas(64) int32_t rows[16 * 8];
      for (int i = 0; i < 8; ++i) {  // two rows at a time
        const uint32_t bits = uint32_t((i < 4 ? upper : lower) >> (16 * (i & 3))) & 0xffff;
        _mm512_store_si512(rows + 16 * i, _mm512_maskz_expandloadu_epi32(__mmask16(bits), from));
        from += _mm_popcnt_u32(bits);
      }
      for (int col = 0; col < 8; ++col) dense[8 * block + col][half] = _mm512_i32gather_epi32(by_row, rows + col, 4);
      for (int j = 0; j < 4; ++j) mask[4 * block + j][half] = mask_of<false>(upper, lower, j);
    }
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    for (int half = 0; half < 2; ++half) {
      masks[2 * pair + half] = mask[pair][half];
      for (int odd = 0; odd < 2; ++odd) {
        const __mmask16 bits = __mmask16(mask[pair][half] >> (16 * odd));
        const int n = _mm_popcnt_u32(bits);
        _mm512_mask_storeu_epi32(to, __mmask16(lowest(n)), _mm512_maskz_compress_epi32(bits, dense[2 * pair + odd][half]));
        to += n;
      }
    }
  }
  return from;
}

}  // namespace

const uint32_t* pack_panel_avx512(const uint32_t* from, const uint64_t* words, int64_t pairs, uint32_t*& to,
                                  uint32_t* masks) {
  return pack_panel(from, words, pairs, to, masks);
}

const uint16_t* pack_panel_avx512(const uint16_t* from, const uint64_t* words, int64_t pairs, bool interleaved,
                                  uint16_t*& to, uint32_t* masks) {
  return interleaved ? pack_panel<true>(from, words, pairs, to, masks) : pack_panel<false>(from, words, pairs, to, masks);
}

}  // namespace spinfer
