// The C ABI of the CPU kernel: all that Python sees. No torch, no C++ types, no exceptions cross it.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define SPINFER_API __declspec(dllexport)
#else
#define SPINFER_API __attribute__((visibility("default")))
#endif

#define SPINFER_CPU_ABI 1

// Types of values and activations.
enum { SPINFER_BF16 = 0, SPINFER_F16 = 1, SPINFER_F32 = 2 };

// Results: 0, or one of these. spinfer_cpu_message says them in words.
enum {
  SPINFER_OUT_OF_MEMORY = -1,
  SPINFER_BAD_ARGUMENT = -2,
  SPINFER_BAD_OFFSETS = -3,  // do not start at 0, decrease, or disagree with the bitmap or the number of values
  SPINFER_BAD_NNZ = -4,
  SPINFER_BITS_OUTSIDE = -5,  // bitmap bits outside the matrix
  SPINFER_BAD_PADDING = -6,   // a GroupTile is padded with something else than zeros
};

// Layout in memory. Rows are cut into panels of 32, columns into pairs. Each (panel, pair) has two 32-bit masks, for its
// first and last 16 rows, stored [panel][pair][half]. The values of the set bits follow in bit order:
//   bf16:       bit 2 * row + parity of the column  (a 32-bit lane is the operand of vdpbf16ps)
//   fp16, fp32: bit 16 * parity of the column + row (16 lanes are one column)
// offsets[panel] is where its values start; the arrays of values end in SPINFER_TAIL_BYTES spare bytes, which the
// kernels may load but never use.
enum { SPINFER_PANEL_ROWS = 32, SPINFER_TAIL_BYTES = 64 };

SPINFER_API int spinfer_cpu_abi(void);
SPINFER_API const char* spinfer_cpu_message(int result);

// Instruction tiers, best first. `best` is the one that this machine should run.
SPINFER_API int spinfer_cpu_tiers(void);
SPINFER_API const char* spinfer_cpu_tier_name(int tier);
SPINFER_API int spinfer_cpu_tier_supported(int tier);
SPINFER_API int spinfer_cpu_tier_best(void);

// The thread pool: GOMP_parallel of the OpenMP runtime that torch has loaded. Without it everything runs on the caller.
typedef void (*spinfer_pool_t)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
SPINFER_API void spinfer_cpu_set_pool(spinfer_pool_t pool);

// Storage layout (FORMAT.md) to panels, in two steps: plan checks the storage and fills offsets [panels + 1], of which the
// last is the number of values to allocate; pack writes values and masks [panels * pairs * 2]. Every read of `bitmap`,
// `offsets_in` and `values_in` is within the lengths that the shape and `values_len` imply, whatever they hold.
SPINFER_API int spinfer_cpu_pack_plan(const uint64_t* bitmap, const int32_t* offsets_in, int64_t values_len, int64_t nnz,
                                      int64_t out_features, int64_t in_features, int64_t* offsets, int threads);
SPINFER_API int spinfer_cpu_pack(int tier, const void* values_in, const uint64_t* bitmap, const int32_t* offsets_in,
                                 int64_t out_features, int64_t in_features, int type, const int64_t* offsets,
                                 void* values, uint32_t* masks, int threads);

// The inverse, in two steps: plan writes bitmap and offsets_out, whose last entry * 8 is the number of values.
SPINFER_API int spinfer_cpu_unpack_plan(const uint32_t* masks, int64_t out_features, int64_t in_features, int type,
                                        uint64_t* bitmap, int32_t* offsets_out, int threads);
SPINFER_API int spinfer_cpu_unpack(const void* values, const uint32_t* masks, const int64_t* offsets,
                                   int64_t out_features, int64_t in_features, int type, const uint64_t* bitmap,
                                   const int32_t* offsets_out, void* values_out, int threads);

// y = x W^T + bias. x: [tokens][in_features], rows x_stride elements apart; y: [tokens][out_features], contiguous, and
// bias: [out_features] or null, both of x's type. Sums are kept in fp32.
SPINFER_API int spinfer_cpu_linear(int tier, const void* values, const uint32_t* masks, const int64_t* offsets,
                                   int64_t out_features, int64_t in_features, int type, const void* x, int64_t x_stride,
                                   int64_t tokens, int x_type, const void* bias, void* y, int threads);

// Read every byte and return their exclusive or: the time that benchmarks hold the kernel against.
SPINFER_API uint64_t spinfer_cpu_read(const void* bytes, int64_t nbytes, int threads);

#ifdef __cplusplus
}
#endif
