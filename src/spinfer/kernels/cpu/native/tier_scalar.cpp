// The portable tier: decode a chunk of a panel into a buffer that stays in L1, then multiply. The inner loops run over the
// 32 rows of a panel, which compilers turn into the vectors of the baseline (SSE2, NEON).
#include "kernel.h"

namespace spinfer {
namespace {

#include "convert.h"
#include "panels.h"

constexpr int64_t kChunkPairs = 64;  // 16 KiB decoded

inline float to_float(Bf16 value) { return float_of_bf16(value.bits); }
inline float to_float(F16 value) { return float_of_f16(value.bits); }
inline float to_float(F32 value) { return float_of_bits(value.bits); }

// Where bit `bit` of the mask of half `half` lies in a decoded pair: [parity][32 rows].
inline int place(Bf16, int half, int bit) { return (bit & 1) * 32 + half * 16 + (bit >> 1); }
inline int place(F16, int half, int bit) { return (bit >> 4) * 32 + half * 16 + (bit & 15); }
inline int place(F32, int half, int bit) { return place(F16{}, half, bit); }

struct Scalar {
  static void load(float* to, const void* from, int type, int64_t n) {
    const uint16_t* half = static_cast<const uint16_t*>(from);
    if (type == SPINFER_BF16) {
      for (int64_t i = 0; i < n; ++i) to[i] = float_of_bf16(half[i]);
    } else if (type == SPINFER_F16) {
      for (int64_t i = 0; i < n; ++i) to[i] = float_of_f16(half[i]);
    } else {
      __builtin_memcpy(to, from, size_t(n) * 4);
    }
  }

  static void store(void* to, const float* from, int type, int64_t n) {
    uint16_t* half = static_cast<uint16_t*>(to);
    if (type == SPINFER_BF16) {
      for (int64_t i = 0; i < n; ++i) half[i] = bf16_of_float(from[i]);
    } else if (type == SPINFER_F16) {
      for (int64_t i = 0; i < n; ++i) half[i] = f16_of_float(from[i]);
    } else {
      __builtin_memcpy(to, from, size_t(n) * 4);
    }
  }

  template <class Value>
  static const Value* block(const Value* values, const uint32_t* masks, int64_t pairs, const float* x, int64_t tokens,
                            float* totals) {
    float dense[kChunkPairs * 64];
    for (int64_t start = 0; start < pairs; start += kChunkPairs) {
      const int64_t n = lesser(kChunkPairs, pairs - start);
      __builtin_memset(dense, 0, size_t(n) * 64 * sizeof(float));
      for (int64_t i = 0; i < 2 * n; ++i) {
        for (uint32_t mask = masks[2 * start + i]; mask; mask &= mask - 1) {
          dense[(i >> 1) * 64 + place(Value{}, int(i & 1), __builtin_ctz(mask))] = to_float(*values++);
        }
      }
      for (int64_t token = 0; token < tokens; ++token) {
        const float* xs = x + token * kRowX + 2 * start;
        float sum[32] = {};
        for (int64_t k = 0; k < 2 * n; ++k) {
          for (int r = 0; r < 32; ++r) sum[r] += dense[k * 32 + r] * xs[k];
        }
        for (int r = 0; r < 32; ++r) totals[token * 32 + r] += sum[r];
      }
    }
    return values;
  }
};

bool supported() { return true; }

}  // namespace

const Tier kScalar = {"scalar", supported, keeps_fp32, prepare_fp32<Scalar>, run_by_type<Scalar>, nullptr, nullptr};

}  // namespace spinfer
