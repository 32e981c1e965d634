// What the tiers provide and the driver calls.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "spinfer_cpu.h"

namespace spinfer {

constexpr int64_t kPanelRows = SPINFER_PANEL_ROWS;

// Columns summed before the registers are added to the fp32 totals: keeps the rounding error of long rows low (two
// levels of summation), and a block of x in L1 (N <= 16) or L2.
constexpr int64_t kBlockK = 512;

// A row of the x workspace: 16 elements more than a block, so that the rows of a token block fall on different L1 sets.
constexpr int64_t kRowX = kBlockK + 16;

struct Weight {
  const void* values;
  const uint32_t* masks;
  const int64_t* offsets;
  int64_t out_features;
  int64_t in_features;
  int type;

  int64_t pairs() const { return (in_features + 1) / 2; }
  int64_t panels() const { return (out_features + kPanelRows - 1) / kPanelRows; }
  int64_t blocks() const { return (in_features + kBlockK - 1) / kBlockK; }
};

// One pass over the weights: up to Tier::pass_tokens rows of x.
struct Pass {
  Weight weight;
  const void* x;  // as the caller gave it
  int64_t x_stride;
  int64_t tokens;
  int x_type;
  const void* bias;
  void* y;
  void* work_x;  // [block][token][kRowX], fp32, or bf16 where the tier says so; amx has an order of its own
};

// Pack one panel's part of a GroupTile: its 32 words and their values, `pairs` column pairs of which lie in the matrix.
// Advances `to`; returns where the next values start.
using PackPanel16 = const uint16_t* (*)(const uint16_t* from, const uint64_t* words, int64_t pairs, bool interleaved,
                                        uint16_t*& to, uint32_t* masks);
using PackPanel32 = const uint32_t* (*)(const uint32_t* from, const uint64_t* words, int64_t pairs, uint32_t*& to,
                                        uint32_t* masks);

struct Tier {
  const char* name;
  bool (*supported)();
  // Whether the workspace holds bf16 for these types (else fp32).
  bool (*keeps_bf16)(int type, int x_type);
  // Fill the rows [first, last) of work_x.
  void (*prepare)(const Pass& pass, int64_t first, int64_t last);
  // Compute the panels [first, last); `totals` has room for 32 * padded_tokens floats, `kRunPanels` times that above
  // kStreamTokens.
  void (*run)(const Pass& pass, int64_t first, int64_t last, float* totals);
  // Where the tier has something faster than the portable way.
  PackPanel16 pack_panel16;
  PackPanel32 pack_panel32;
  // The tier that is faster with these types and so many tokens, if it is not this one.
  const Tier* (*instead)(int type, int x_type, int64_t tokens) = nullptr;
  // The first row of work_x to fill, if not all are needed.
  int64_t (*first_to_prepare)(const Pass& pass) = nullptr;
  // Tokens of one pass; bounds the workspace.
  int64_t pass_tokens = 128;
};

// What the workspaces of x and of the sums have room for: amx computes whole tiles of 16.
inline int64_t padded_tokens(int64_t tokens) { return (tokens + 15) / 16 * 16; }

// With up to this many tokens, a panel is streamed from its first value to its last; with more, `kRunPanels` panels share
// each block of x, which then comes from L2 once for all of them.
constexpr int64_t kStreamTokens = 16;
constexpr int64_t kRunPanels = 8;

// The tier of that index, if it exists and this CPU has its instructions; else null.
const Tier* usable_tier(int index);

extern const Tier kScalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const Tier kAvx2;
extern const Tier kAvx512;
extern const Tier kAvx512Bf16;
extern const Tier kAmx;

const uint16_t* pack_panel_avx512(const uint16_t* from, const uint64_t* words, int64_t pairs, bool interleaved,
                                  uint16_t*& to, uint32_t* masks);
const uint32_t* pack_panel_avx512(const uint32_t* from, const uint64_t* words, int64_t pairs, uint32_t*& to,
                                  uint32_t* masks);
#endif

}  // namespace spinfer
