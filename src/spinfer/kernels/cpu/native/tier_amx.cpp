// AMX: bf16 x bf16 on tdpbf16ps, everything else as tier_avx512.
//
// An expanded mask, 16 rows of two columns, is a row of the tile that tdpbf16ps takes as its second operand: 16 pairs of
// columns are a tile, and a panel has two side by side. The first operand is a tile of x, up to 16 tokens of 32 columns,
// and the sums are tokens by rows. A chunk of a panel is expanded into L1 while the one before is multiplied from there,
// so that the time of the one hides in the other's.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <type_traits>
#include <utility>

#include "avx512.h"

namespace spinfer {
namespace {

constexpr int64_t kTilePairs = 16;
constexpr int64_t kTileTokens = 16;
constexpr int64_t kTileNbytes = 1024;

// One is faster multiplied as it is expanded (2048 x 576: 75 us against 84; 4096 x 4096 at 70 %: 701 against 739), two are
// not (87 against 86; 809 against 730).
constexpr int64_t kFewestTokens = 2;

constexpr int64_t kMostChunkTiles = 9;

// Tokens are cut into tiles of the same size, because a tile takes time for each of its rows.
struct TokenTiles {
  int64_t count, rows;

  explicit TokenTiles(int64_t tokens)
      : count((tokens + kTileTokens - 1) / kTileTokens), rows((tokens + count - 1) / count) {}

  int64_t tokens() const { return count * rows; }
  // Two tiles of sums by two stay in registers for all of a panel.
  bool one_group() const { return count <= 2; }
  // Most tiles of weights to a chunk, of `tiles`. Measured at 4096 x 4096: 8 instead of 4 costs 10 to 34 % with one group,
  // whose sums are never stored in between; 4 instead of 8 costs 7 to 9 % with more. 576 columns are two of 9, not three of 6:
  // sums are fetched once less, 4 to 6 % at 512 tokens.
  int64_t most_chunk_tiles(int64_t tiles) const { return one_group() ? 4 : tiles <= 2 * kMostChunkTiles ? kMostChunkTiles : 8; }
};

constexpr int64_t kHalfNbytes = kMostChunkTiles * kTileNbytes;

// Where the chunks of a weight lie: all of the same size, but what the last one lacks.
struct Chunks {
  int64_t pairs;  // of a row
  int64_t count;
  int64_t chunk_pairs;  // of all chunks but the last

  Chunks(const Weight& w, const TokenTiles& tokens) : pairs(w.pairs()) {
    const int64_t tiles = (pairs + kTilePairs - 1) / kTilePairs, most = tokens.most_chunk_tiles(tiles);
    count = (tiles + most - 1) / most;
    chunk_pairs = (tiles + count - 1) / count * kTilePairs;
  }

  int64_t pairs_of(int64_t chunk) const { return lesser(chunk_pairs, pairs - chunk * chunk_pairs); }
  int64_t tiles_of(int64_t chunk) const { return (pairs_of(chunk) + kTilePairs - 1) / kTilePairs; }
};

// Tiles 0 to 3 are sums, 4 and 5 x, 6 and 7 weights.
void configure(int64_t token_rows) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_nbytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_nbytes[tile] = 64;
    config.rows[tile] = uint8_t(tile < 6 ? token_rows : kTilePairs);
  }
  _tile_loadconfig(&config);
}

// Expands a chunk, a few pairs at a time: its tiles of the panel's first 16 rows, and kHalfNbytes on those of the last.
struct Decoder {
  const Bf16* values;
  const uint32_t* masks;
  char* to;
  int64_t left;

  Decoder(const Bf16* values, const uint32_t* masks, int64_t pairs, char* to)
      : values(values), masks(masks), to(to), left(pairs) {
    const size_t missing = size_t(-pairs & (kTilePairs - 1)) * 64;  // of the last tile
    __builtin_memset(to + pairs * 64, 0, missing);
    __builtin_memset(to + kHalfNbytes + pairs * 64, 0, missing);
  }

  __attribute__((always_inline)) void expand(int64_t pairs) {
    if (pairs > left) pairs = left;
    left -= pairs;
    for (; pairs > 0; --pairs) {
      prefetch(kAhead, values, masks);
      const __m512i first = expand16(masks[0], values);
      values += _mm_popcnt_u32(masks[0]);
      const __m512i last = expand16(masks[1], values);
      values += _mm_popcnt_u32(masks[1]);
      _mm512_store_si512(to, first);
      _mm512_store_si512(to + kHalfNbytes, last);
      masks += 2;
      to += 64;
    }
  }
};

// Sums of one or two tiles of tokens and a panel.
template <bool kTwo>
struct Sums {
  static constexpr int64_t kRow = kPanelRows * 4;

  static void clear() {
    _tile_zero(0);
    _tile_zero(1);
    if (kTwo) _tile_zero(2);
    if (kTwo) _tile_zero(3);
  }

  static void load(const float* from, int64_t rows) {
    _tile_loadd(0, from, kRow);
    _tile_loadd(1, from + 16, kRow);
    if (kTwo) _tile_loadd(2, from + rows * kPanelRows, kRow);
    if (kTwo) _tile_loadd(3, from + rows * kPanelRows + 16, kRow);
  }

  static void store(float* to, int64_t rows) {
    _tile_stored(0, to, kRow);
    _tile_stored(1, to + 16, kRow);
    if (kTwo) _tile_stored(2, to + rows * kPanelRows, kRow);
    if (kTwo) _tile_stored(3, to + rows * kPanelRows + 16, kRow);
  }
};

// Tiles of x side by side: where the first one is, and how far apart they and the rows of each are, in bytes.
struct XTiles {
  const char* at;
  int64_t step, row;

  void go_on() {
    at += step;
    for (int64_t i = 0; i < kTileTokens; ++i) __builtin_prefetch(at + i * row);  // 8 % at 512 tokens, whose x comes from L2
  }
};

// Add x times an expanded chunk to the sums. For each tile, `quota` pairs of the next chunk are expanded, some after each
// instruction that waits: the window of a core does not reach over more.
template <bool kTwo>
void multiply(const char* chunk, int64_t tiles, XTiles x, XTiles second, Decoder& next_chunk, int64_t quota) {
  constexpr int64_t kParts = kTwo ? 4 : 3;
  const int64_t part = (quota + kParts - 1) / kParts;
  Decoder decoder = next_chunk;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    _tile_loadd(6, chunk, 64);
    _tile_loadd(4, x.at, x.row);
    decoder.expand(part);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, chunk + kHalfNbytes, 64);
    decoder.expand(part);
    _tile_dpbf16ps(1, 4, 7);
    decoder.expand(part);
    chunk += kTileNbytes;
    if (kTwo) {
      _tile_loadd(5, second.at, second.row);
      _tile_dpbf16ps(2, 5, 6);
      decoder.expand(part);
      _tile_dpbf16ps(3, 5, 7);
      x.go_on();
      second.go_on();
    } else {
      x.at += x.step;
    }
  }
  next_chunk = decoder;
}

// Tiles are loaded from x as it is where copying it would not pay: few panels (576 x 1536, 16 to 64 tokens: 10 to 20 % faster;
// 3072 x 576: up to 8 % slower), rows of whole lines of the cache, which do not meet in a few sets of L1.
bool loads_x(const Pass& pass) {
  const uint64_t stride = uint64_t(pass.x_stride) * 2;
  return pass.weight.panels() <= 32 && pass.weight.in_features % 32 == 0 &&
         (stride | reinterpret_cast<uintptr_t>(pass.x)) % 64 == 0 && stride % 2048 != 0;
}

// The first token that `prepare` copies: that of a tile. With loads_x only a last tile that is not full is copied.
int64_t first_to_prepare(const Pass& pass) {
  const TokenTiles tokens(pass.tokens);
  if (!loads_x(pass)) return 0;
  return tokens.tokens() == pass.tokens ? pass.tokens : (tokens.count - 1) * tokens.rows;
}

// [chunk][tile of tokens][tile of columns][token][32 columns], zeros after the last column. What follows the last token is
// left as it is: it goes into sums that nobody reads. With loads_x the tile of tokens that is copied stands alone.
void prepare(const Pass& pass, int64_t first, int64_t last) {
  const Weight& w = pass.weight;
  const TokenTiles tokens(pass.tokens);
  const Chunks chunks(w, tokens);
  const int64_t before = first_to_prepare(pass) / tokens.rows, copied = tokens.count - before;
  const uint16_t* x = static_cast<const uint16_t*>(pass.x);
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t tiles = chunks.tiles_of(chunk);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t column = chunk * chunks.chunk_pairs * 2 + tile * 32;
      const __mmask32 inside = __mmask32((uint64_t(1) << lesser(32, w.in_features - column)) - 1);
      uint16_t* to = static_cast<uint16_t*>(pass.work_x) + (column - tile * 32) * copied * tokens.rows;
      for (int64_t token = first; token < last; ++token) {
        const int64_t row = ((token / tokens.rows - before) * tiles + tile) * tokens.rows + token % tokens.rows;
        _mm512_storeu_si512(to + row * 32, _mm512_maskz_loadu_epi16(inside, x + token * pass.x_stride + column));
      }
    }
  }
}

// Finds the tiles of x that go with a chunk.
struct XFinder {
  const Pass& pass;
  const TokenTiles& tokens;
  const Chunks& chunks;
  const int64_t before = first_to_prepare(pass) / tokens.rows;  // tiles of tokens that are not in work_x

  XTiles at(int64_t chunk, int64_t tile) const {
    const int64_t column_nbytes = chunk * chunks.chunk_pairs * 4;
    if (tile < before) {
      const int64_t stride = pass.x_stride * 2;
      return {static_cast<const char*>(pass.x) + tile * tokens.rows * stride + column_nbytes, 64, stride};
    }
    const int64_t first = (tile - before) * chunks.tiles_of(chunk) * tokens.rows * 64;
    return {static_cast<const char*>(pass.work_x) + column_nbytes * (tokens.count - before) * tokens.rows + first,
            tokens.rows * 64, 64};
  }
};

// The panels [first, last), at most kRunPanels; one with one group of tokens.
void run_panels(const Pass& pass, const TokenTiles& tokens, int64_t first, int64_t last, float* totals) {
  const Weight& w = pass.weight;
  const Chunks chunks(w, tokens);
  const XFinder x{pass, tokens, chunks};
  const int64_t groups = (tokens.count + 1) / 2;
  const int64_t panel_totals = tokens.tokens() * kPanelRows;
  alignas(64) char buffers[2][2 * kHalfNbytes];
  const Bf16* next[kRunPanels];
  for (int64_t panel = first; panel < last; ++panel) {
    next[panel - first] = static_cast<const Bf16*>(w.values) + w.offsets[panel];
  }
  const auto decoder_of = [&](int64_t chunk, int64_t panel, char* buffer) {
    const uint32_t* masks = w.masks + (panel * chunks.pairs + chunk * chunks.chunk_pairs) * 2;
    return Decoder(next[panel - first], masks, chunks.pairs_of(chunk), buffer);
  };

  char* buffer = buffers[0];
  char* other = buffers[1];
  Decoder decoder = decoder_of(0, first, buffer);
  decoder.expand(decoder.left);
  next[0] = decoder.values;
  for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const int64_t tiles = chunks.tiles_of(chunk);
    const bool starts = chunk == 0, ends = chunk + 1 == chunks.count;
    for (int64_t panel = first; panel < last; ++panel) {
      const bool wraps = panel + 1 == last;
      const int64_t next_panel = wraps ? first : panel + 1;
      if (!(wraps && ends)) decoder = decoder_of(chunk + wraps, next_panel, other);
      const int64_t quota = (decoder.left + tiles * groups - 1) / (tiles * groups);
      const auto multiply_group = [&](auto two, int64_t tile) {
        using Group = Sums<two.value>;
        float* sums = totals + (panel - first) * panel_totals + tile * tokens.rows * kPanelRows;
        if (starts) {
          Group::clear();
        } else if (!tokens.one_group()) {
          Group::load(sums, tokens.rows);
        }
        const XTiles first_tokens = x.at(chunk, tile);
        multiply<two.value>(buffer, tiles, first_tokens, two.value ? x.at(chunk, tile + 1) : first_tokens, decoder, quota);
        if (ends || !tokens.one_group()) Group::store(sums, tokens.rows);
      };
      // GCC takes the load of a tile for something that reads no memory.
      asm volatile("" ::: "memory");
      int64_t tile = 0;
      for (; tile + 2 <= tokens.count; tile += 2) multiply_group(std::true_type{}, tile);
      if (tile < tokens.count) multiply_group(std::false_type{}, tile);
      decoder.expand(decoder.left);
      asm volatile("" ::: "memory");
      next[next_panel - first] = decoder.values;
      std::swap(buffer, other);
    }
  }
  write_panels<Avx512>(pass, first, last, totals, panel_totals);
}

void run(const Pass& pass, int64_t first, int64_t last, float* totals) {
  const TokenTiles tokens(pass.tokens);
  const int64_t step = tokens.one_group() ? 1 : kRunPanels;
  configure(tokens.rows);
  for (int64_t panel = first; panel < last; panel += step) {
    run_panels(pass, tokens, panel, lesser(panel + step, last), totals);
  }
  _tile_release();
}

// Linux keeps the tiles of processes that have asked for it.
bool ask_for_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  unsigned eax, ebx, ecx, edx;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if (!(edx & kBf16) || !(edx & kTile)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool supported() {
  static const bool granted = ask_for_tiles();  // cpuid leaves a virtual machine, which takes 20 us and more
  return granted;
}

bool keeps_bf16(int, int) { return true; }

const Tier* instead(int type, int x_type, int64_t tokens) {
  const bool bf16 = type == SPINFER_BF16 && x_type == SPINFER_BF16;
  return bf16 && tokens >= kFewestTokens ? nullptr : &kAvx512;
}

}  // namespace

// With 512 tokens a pass the expansion hides (4096 x 4096: 26 ms for 512 tokens in passes of 128, 25 in one).
const Tier kAmx = {"amx", supported, keeps_bf16, prepare, run, pack_panel_avx512, pack_panel_avx512, instead, first_to_prepare,
                   512};

}  // namespace spinfer
