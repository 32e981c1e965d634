// Storage layout (FORMAT.md) to panels and back, one row of GroupTiles (two panels) at a time.
//
// Both ways go through a small dense buffer of one GroupTile whose order is that of the panels' masks, so that packing is
// a scatter by the bitmap followed by a gather by the masks.
#include <string.h>

#include "kernel.h"
#include "parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace spinfer {
namespace {

constexpr int64_t kTile = 64;         // rows and columns of a GroupTile
constexpr int64_t kTileWords = 64;    // BitmapTiles in it
constexpr int64_t kTilePairs = 32;    // column pairs in it
constexpr int64_t kOffsetUnit = 8;

struct Grid {
  int64_t out_features, in_features;

  int64_t rows() const { return (out_features + kTile - 1) / kTile; }
  int64_t cols() const { return (in_features + kTile - 1) / kTile; }
  int64_t tiles() const { return rows() * cols(); }
  int64_t pairs() const { return (in_features + 1) / 2; }
  int64_t panels() const { return (out_features + kPanelRows - 1) / kPanelRows; }
  int64_t panels_of(int64_t group_row) const { return panels() - 2 * group_row < 2 ? 1 : 2; }
  int64_t pairs_of(int64_t tile_col) const {
    const int64_t rest = pairs() - tile_col * kTilePairs;
    return rest < kTilePairs ? rest : kTilePairs;
  }
  bool sane() const {
    constexpr int64_t kMost = int64_t(1) << 40;
    return out_features > 0 && in_features > 0 && out_features < kMost && in_features < kMost &&
           out_features <= kMost / in_features;
  }
};

inline int count(uint64_t word) { return __builtin_popcountll(word); }

// Word w of a GroupTile covers rows [row, row + 8) and columns [col, col + 8); w counts [band][TCTile][column half][row
// half].
struct Place {
  int row, col;
};

inline Place place_of(int w) { return {(w >> 4) * 16 + (w & 1) * 8, (w >> 2 & 3) * 16 + (w >> 1 & 1) * 8}; }

inline int word_at(int row, int col) {
  return (row >> 4) * 16 + (col >> 4) * 4 + (col >> 3 & 1) * 2 + (row >> 3 & 1);
}

// The masks of a type. gather: the 16 mask bits that columns 2 j and 2 j + 1 of a BitmapTile word give, for its 8 rows;
// spread: the inverse. join: where the upper and the lower tile's bits go in a 32-bit mask.
struct Interleaved {  // bit 2 * row + parity
  static uint32_t gather(uint64_t word, int j) {
    uint64_t bits = word >> (2 * j) & 0x0303030303030303u;
    bits = (bits | bits >> 6) & 0x000f000f000f000fu;
    bits = (bits | bits >> 12) & 0x000000ff000000ffu;
    return uint32_t((bits | bits >> 24) & 0xffff);
  }
  static uint64_t spread(uint32_t bits16, int j) {
    uint64_t bits = bits16;
    bits = (bits | bits << 24) & 0x000000ff000000ffu;
    bits = (bits | bits << 12) & 0x000f000f000f000fu;
    bits = (bits | bits << 6) & 0x0303030303030303u;
    return bits << (2 * j);
  }
  static uint32_t join(uint32_t upper, uint32_t lower) { return upper | lower << 16; }
  static void split(uint32_t mask, uint32_t& upper, uint32_t& lower) {
    upper = mask & 0xffff;
    lower = mask >> 16;
  }
  static constexpr int bit(int row, int parity) { return 2 * row + parity; }
};

struct ByColumn {  // bit 16 * parity + row
  static uint32_t column(uint64_t word, int c) {
    return uint32_t((word >> c & 0x0101010101010101u) * 0x0102040810204080u >> 56);
  }
  static uint64_t place_column(uint32_t byte, int c) {
    uint64_t bits = byte;
    bits = (bits | bits << 28) & 0x0000000f0000000fu;
    bits = (bits | bits << 14) & 0x0003000300030003u;
    bits = (bits | bits << 7) & 0x0101010101010101u;
    return bits << c;
  }
  static uint32_t gather(uint64_t word, int j) { return column(word, 2 * j) | column(word, 2 * j + 1) << 8; }
  static uint64_t spread(uint32_t bits16, int j) {
    return place_column(bits16 & 0xff, 2 * j) | place_column(bits16 >> 8, 2 * j + 1);
  }
  static uint32_t join(uint32_t upper, uint32_t lower) {
    return (upper & 0xff) | (lower & 0xff) << 8 | (upper >> 8) << 16 | (lower >> 8) << 24;
  }
  static void split(uint32_t mask, uint32_t& upper, uint32_t& lower) {
    upper = (mask & 0xff) | (mask >> 16 & 0xff) << 8;
    lower = (mask >> 8 & 0xff) | (mask >> 24) << 8;
  }
  static constexpr int bit(int row, int parity) { return 16 * parity + row; }
};

// A panel's part of a GroupTile, dense: [pair][half][bit of the mask].
template <class Order>
constexpr int64_t cell(int row, int col) {
  return (col >> 1) * 64 + (row >> 4) * 32 + Order::bit(row & 15, col & 1);
}

// cell(row + r, col + c) = cell(row, col) + cells[8 * r + c] for a BitmapTile at (row, col).
template <class Order>
struct Cells {
  int16_t at[64];
  constexpr Cells() : at() {
    for (int bit = 0; bit < 64; ++bit) at[bit] = int16_t(cell<Order>(bit >> 3, bit & 7));
  }
};
template <class Order>
constexpr Cells<Order> kCells{};

template <class Order>
uint32_t mask_of(const uint64_t* words, int pair, int half) {
  const int col = 2 * pair;
  const uint64_t* pair_of_tiles = words + word_at(half * 16, col);  // the lower tile's word follows
  return Order::join(Order::gather(pair_of_tiles[0], pair & 3), Order::gather(pair_of_tiles[1], pair & 3));
}

// Transparent huge pages where the system leaves the choice to us; only whole pages inside the array are asked for.
void advise_huge(void* begin, size_t nbytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + nbytes) & ~(kHuge - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)nbytes;
#endif
}

// One panel's part of a GroupTile: scatter its 32 words' values, gather them by its masks.
template <class Order, class Value>
const Value* pack_panel(const Value* from, const uint64_t* words, int64_t pairs, Value*& to, uint32_t* masks) {
  Value dense[kTile * kPanelRows];
  for (int w = 0; w < 32; ++w) {
    const Place place = place_of(w);
    Value* cells = dense + cell<Order>(place.row, place.col);
    for (uint64_t word = words[w]; word; word &= word - 1) cells[kCells<Order>.at[__builtin_ctzll(word)]] = *from++;
  }
  Value* next = to;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    for (int half = 0; half < 2; ++half) {
      const Value* cells = dense + (pair * 2 + half) * 32;
      const uint32_t mask = mask_of<Order>(words, int(pair), half);
      masks[2 * pair + half] = mask;
      for (uint32_t rest = mask; rest; rest &= rest - 1) *next++ = cells[__builtin_ctz(rest)];
    }
  }
  to = next;
  return from;
}

template <class Order, class Value>
bool pack_rows(const Tier& tier, const Value* values_in, const uint64_t* bitmap, const int32_t* offsets_in,
               const Grid& grid, const int64_t* offsets, Value* values, uint32_t* masks, int64_t group_row) {
  bool zero_padding = true;
  const int64_t panels = grid.panels_of(group_row);
  Value* next[2];
  for (int64_t p = 0; p < panels; ++p) next[p] = values + offsets[2 * group_row + p];
  for (int64_t tile_col = 0; tile_col < grid.cols(); ++tile_col) {
    const int64_t tile = group_row * grid.cols() + tile_col;
    const uint64_t* words = bitmap + tile * kTileWords;
    const Value* from = values_in + int64_t(offsets_in[tile]) * kOffsetUnit;
    const int64_t pairs = grid.pairs_of(tile_col);
    for (int64_t p = 0; p < panels; ++p) {
      uint32_t* to_masks = masks + ((2 * group_row + p) * grid.pairs() + tile_col * kTilePairs) * 2;
      if constexpr (sizeof(Value) == 2) {
        if (tier.pack_panel16) {
          from = tier.pack_panel16(from, words + 32 * p, pairs, Order::bit(1, 0) == 2, next[p], to_masks);
          continue;
        }
      } else if (tier.pack_panel32) {
        from = tier.pack_panel32(from, words + 32 * p, pairs, next[p], to_masks);
        continue;
      }
      from = pack_panel<Order>(from, words + 32 * p, pairs, next[p], to_masks);
    }
    for (const Value* end = values_in + int64_t(offsets_in[tile + 1]) * kOffsetUnit; from < end; ++from) {
      zero_padding &= *from == 0;
    }
  }
  return zero_padding;
}

template <class Order>
void bitmap_rows(const uint32_t* masks, const Grid& grid, uint64_t* bitmap, int64_t group_row) {
  const int64_t panels = grid.panels_of(group_row);
  for (int64_t tile_col = 0; tile_col < grid.cols(); ++tile_col) {
    uint64_t* words = bitmap + (group_row * grid.cols() + tile_col) * kTileWords;
    memset(words, 0, kTileWords * sizeof(uint64_t));
    const int64_t pairs = grid.pairs_of(tile_col);
    for (int64_t p = 0; p < panels; ++p) {
      const uint32_t* from = masks + ((2 * group_row + p) * grid.pairs() + tile_col * kTilePairs) * 2;
      for (int64_t pair = 0; pair < pairs; ++pair) {
        for (int half = 0; half < 2; ++half) {
          uint32_t upper, lower;
          Order::split(from[2 * pair + half], upper, lower);
          uint64_t* pair_of_tiles = words + word_at(int(2 * p + half) * 16, int(2 * pair));
          pair_of_tiles[0] |= Order::spread(upper, int(pair & 3));
          pair_of_tiles[1] |= Order::spread(lower, int(pair & 3));
        }
      }
    }
  }
}

template <class Order, class Value>
void unpack_rows(const Value* values, const uint32_t* masks, const int64_t* offsets, const Grid& grid,
                 const uint64_t* bitmap, const int32_t* offsets_out, Value* values_out, int64_t group_row) {
  Value dense[kTile * kPanelRows];
  const int64_t panels = grid.panels_of(group_row);
  const Value* next[2];
  for (int64_t p = 0; p < panels; ++p) next[p] = values + offsets[2 * group_row + p];
  for (int64_t tile_col = 0; tile_col < grid.cols(); ++tile_col) {
    const int64_t tile = group_row * grid.cols() + tile_col;
    Value* to = values_out + int64_t(offsets_out[tile]) * kOffsetUnit;
    for (int64_t p = 0; p < panels; ++p) {
      const uint32_t* from_masks = masks + ((2 * group_row + p) * grid.pairs() + tile_col * kTilePairs) * 2;
      const Value* from = next[p];
      for (int64_t i = 0; i < 2 * grid.pairs_of(tile_col); ++i) {
        Value* cells = dense + i * 32;
        for (uint32_t mask = from_masks[i]; mask; mask &= mask - 1) cells[__builtin_ctz(mask)] = *from++;
      }
      next[p] = from;
      const uint64_t* words = bitmap + tile * kTileWords + 32 * p;
      for (int w = 0; w < 32; ++w) {
        const Place place = place_of(w);
        const Value* cells = dense + cell<Order>(place.row, place.col);
        for (uint64_t word = words[w]; word; word &= word - 1) *to++ = cells[kCells<Order>.at[__builtin_ctzll(word)]];
      }
    }
    for (Value* end = values_out + int64_t(offsets_out[tile + 1]) * kOffsetUnit; to < end; ++to) *to = 0;
  }
}

// Bits of word w of an edge GroupTile that lie in the matrix when `rows` rows and `cols` columns of the tile do.
uint64_t inside(int w, int64_t rows, int64_t cols) {
  const Place place = place_of(w);
  uint64_t bits = 0;
  for (int r = 0; r < 8; ++r) {
    for (int c = 0; c < 8; ++c) {
      if (place.row + r < rows && place.col + c < cols) bits |= uint64_t(1) << (8 * r + c);
    }
  }
  return bits;
}

// Count one row of GroupTiles into its panels; every read stays within the bitmap and the offsets.
int plan_row(const uint64_t* bitmap, const int32_t* offsets_in, int64_t units, const Grid& grid, int64_t group_row,
             int64_t* counts) {
  const int64_t row_room = grid.out_features - group_row * kTile;
  counts[0] = counts[1] = 0;
  for (int64_t tile_col = 0; tile_col < grid.cols(); ++tile_col) {
    const int64_t tile = group_row * grid.cols() + tile_col;
    const uint64_t* words = bitmap + tile * kTileWords;
    const int64_t col_room = grid.in_features - tile_col * kTile;
    if (row_room < kTile || col_room < kTile) {
      for (int w = 0; w < kTileWords; ++w) {
        if (words[w] & ~inside(w, row_room, col_room)) return SPINFER_BITS_OUTSIDE;
      }
    }
    int64_t upper = 0, lower = 0;
    for (int w = 0; w < 32; ++w) upper += count(words[w]);
    for (int w = 32; w < 64; ++w) lower += count(words[w]);
    const int64_t first = offsets_in[tile], end = offsets_in[tile + 1];
    if (first < 0 || end < first || end > units) return SPINFER_BAD_OFFSETS;
    if (end - first != (upper + lower + kOffsetUnit - 1) / kOffsetUnit) return SPINFER_BAD_OFFSETS;
    counts[0] += upper;
    counts[1] += lower;
  }
  return 0;
}

// Call f(Order, Value) for a type of values.
template <class F>
void by_type(int type, F f) {
  if (type == SPINFER_BF16) {
    f(Interleaved{}, uint16_t{});
  } else if (type == SPINFER_F16) {
    f(ByColumn{}, uint16_t{});
  } else {
    f(ByColumn{}, uint32_t{});
  }
}

bool known(int type) { return type >= SPINFER_BF16 && type <= SPINFER_F32; }

}  // namespace
}  // namespace spinfer

using namespace spinfer;

extern "C" {

int spinfer_cpu_pack_plan(const uint64_t* bitmap, const int32_t* offsets_in, int64_t values_len, int64_t nnz,
                          int64_t out_features, int64_t in_features, int64_t* offsets, int threads) {
  const Grid grid{out_features, in_features};
  if (!grid.sane() || values_len < 0 || values_len % kOffsetUnit) return SPINFER_BAD_ARGUMENT;
  const int64_t units = values_len / kOffsetUnit;
  if (offsets_in[0] != 0 || offsets_in[grid.tiles()] != units) return SPINFER_BAD_OFFSETS;
  std::atomic<int> result{0};
  parallel_for(threads, grid.rows(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t counts[2];
      const int error = plan_row(bitmap, offsets_in, units, grid, row, counts);
      if (error) return result.store(error, std::memory_order_relaxed);
      for (int64_t p = 0; p < 2 && 2 * row + p < grid.panels(); ++p) offsets[2 * row + p + 1] = counts[p];
    }
  });
  if (result.load()) return result.load();
  offsets[0] = 0;
  for (int64_t panel = 0; panel < grid.panels(); ++panel) offsets[panel + 1] += offsets[panel];
  return offsets[grid.panels()] == nnz ? 0 : SPINFER_BAD_NNZ;
}

int spinfer_cpu_pack(int tier, const void* values_in, const uint64_t* bitmap, const int32_t* offsets_in, int64_t out_features,
                     int64_t in_features, int type, const int64_t* offsets, void* values, uint32_t* masks, int threads) {
  const Grid grid{out_features, in_features};
  const Tier* usable = usable_tier(tier);
  if (!usable || !grid.sane() || !known(type)) return SPINFER_BAD_ARGUMENT;
  const size_t size = type == SPINFER_F32 ? 4 : 2;
  const size_t used = size_t(offsets[grid.panels()]) * size;
  advise_huge(values, used + SPINFER_TAIL_BYTES);
  advise_huge(masks, size_t(grid.panels() * grid.pairs()) * 8);
  memset(static_cast<char*>(values) + used, 0, SPINFER_TAIL_BYTES);
  std::atomic<int> result{0};
  by_type(type, [&](auto order, auto value) {
    using Order = decltype(order);
    using Value = decltype(value);
    parallel_for(threads, grid.rows(), 1, [&](int64_t row, int64_t) {
      if (!pack_rows<Order>(*usable, static_cast<const Value*>(values_in), bitmap, offsets_in, grid, offsets,
                            static_cast<Value*>(values), masks, row)) {
        result.store(SPINFER_BAD_PADDING, std::memory_order_relaxed);
      }
    });
  });
  return result.load();
}

int spinfer_cpu_unpack_plan(const uint32_t* masks, int64_t out_features, int64_t in_features, int type,
                            uint64_t* bitmap, int32_t* offsets_out, int threads) {
  const Grid grid{out_features, in_features};
  if (!grid.sane() || !known(type)) return SPINFER_BAD_ARGUMENT;
  by_type(type, [&](auto order, auto) {
    parallel_for(threads, grid.rows(), 1, [&](int64_t row, int64_t) {
      bitmap_rows<decltype(order)>(masks, grid, bitmap, row);
    });
  });
  int64_t end = 0;
  for (int64_t tile = 0; tile < grid.tiles(); ++tile) {
    offsets_out[tile] = int32_t(end);
    int64_t bits = 0;
    for (int w = 0; w < kTileWords; ++w) bits += count(bitmap[tile * kTileWords + w]);
    end += (bits + kOffsetUnit - 1) / kOffsetUnit;
    if (end > INT32_MAX) return SPINFER_BAD_OFFSETS;
  }
  offsets_out[grid.tiles()] = int32_t(end);
  return 0;
}

int spinfer_cpu_unpack(const void* values, const uint32_t* masks, const int64_t* offsets, int64_t out_features,
                       int64_t in_features, int type, const uint64_t* bitmap, const int32_t* offsets_out,
                       void* values_out, int threads) {
  const Grid grid{out_features, in_features};
  if (!grid.sane() || !known(type)) return SPINFER_BAD_ARGUMENT;
  by_type(type, [&](auto order, auto value) {
    using Value = decltype(value);
    parallel_for(threads, grid.rows(), 1, [&](int64_t row, int64_t) {
      unpack_rows<decltype(order)>(static_cast<const Value*>(values), masks, offsets, grid, bitmap, offsets_out,
                                   static_cast<Value*>(values_out), row);
    });
  });
  return 0;
}

}  // extern "C"
