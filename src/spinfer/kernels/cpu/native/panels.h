// The loops that every tier shares. A tier includes this inside its anonymous namespace, after convert.h, and calls
// `run_panels<Impl>` and `prepare_rows<Impl>` with a class Impl that has
//   static void load(float* to, const void* from, int type, int64_t n)         n activations to fp32
//   static void store(void* to, const float* from, int type, int64_t n)        n fp32 to the activations' type
//   template <class Value> static const Value* block(values, masks, pairs, const void* x, tokens, totals)
//       totals[token][32] += panel block (pairs) times x rows (kRowX apart); returns where the next values start
//   template <class Value> static const Value* block_bf16(...)                  the same for a bf16 workspace

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
struct F32 {
  uint32_t bits;
};

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

// How far ahead a panel is prefetched, in bytes (0: not at all): far into L2 and nearer into L1, because the hardware's own
// prefetch stops at each 4 KiB page, and lines that come straight from memory hold L1's few fill buffers too long.
struct Ahead {
  int64_t far_values, near_values, far_masks, near_masks;
};

// Prefetch for one pair. Always inlined: GCC 12 drops calls of functions that do nothing but prefetch.
template <class Value>
__attribute__((always_inline)) inline void prefetch(const Ahead& ahead, const Value* values, const uint32_t* masks) {
  const char* of_values = reinterpret_cast<const char*>(values);
  const char* of_masks = reinterpret_cast<const char*>(masks);
  for (size_t line = 0; line < 32 * sizeof(Value); line += 64) {  // two half full masks have 32 values
    if (ahead.far_values) __builtin_prefetch(of_values + ahead.far_values + line, 0, 2);
    __builtin_prefetch(of_values + ahead.near_values + line);
  }
  if (ahead.far_masks) __builtin_prefetch(of_masks + ahead.far_masks, 0, 2);
  if (ahead.near_masks) __builtin_prefetch(of_masks + ahead.near_masks);
}

// Call each(first token, number of tokens) for parts of at most `most` tokens and of nearly the same size.
template <class Each>
void in_parts(int64_t tokens, int64_t most, Each each) {
  int64_t parts = (tokens + most - 1) / most;
  for (int64_t token = 0; token < tokens; --parts) {
    const int64_t size = (tokens - token + parts - 1) / parts;
    each(token, size);
    token += size;
  }
}

template <class Impl>
void prepare_rows(const Pass& pass, int64_t first, int64_t last, bool bf16) {
  const Weight& w = pass.weight;
  const int64_t x_size = pass.x_type == SPINFER_F32 ? 4 : 2;
  for (int64_t token = first; token < last; ++token) {
    const char* row = static_cast<const char*>(pass.x) + token * pass.x_stride * x_size;
    for (int64_t block = 0; block < w.blocks(); ++block) {
      const int64_t begin = block * kBlockK;
      const int64_t n = lesser(kBlockK, w.in_features - begin);
      const int64_t at = (block * pass.tokens + token) * kRowX;
      if (bf16) {
        uint16_t* to = static_cast<uint16_t*>(pass.work_x) + at;
        __builtin_memcpy(to, row + begin * x_size, size_t(n) * 2);
        to[n] = 0;
      } else {
        float* to = static_cast<float*>(pass.work_x) + at;
        Impl::load(to, row + begin * x_size, pass.x_type, n);
        to[n] = 0;  // the missing half of the last pair
      }
    }
  }
}

// Add the bias to the sums of the panels [first, last), `panel_totals` apart, and store them as y, token by token: the
// panels' parts of a row are neighbours.
template <class Impl>
void write_panels(const Pass& pass, int64_t first, int64_t last, float* totals, int64_t panel_totals) {
  const Weight& w = pass.weight;
  const int64_t y_size = pass.x_type == SPINFER_F32 ? 4 : 2;
  const int64_t row = first * kPanelRows;
  const int64_t rows = lesser(last * kPanelRows, w.out_features) - row;
  float bias[kRunPanels * kPanelRows] = {};
  if (pass.bias) Impl::load(bias, static_cast<const char*>(pass.bias) + row * y_size, pass.x_type, rows);
  for (int64_t token = 0; token < pass.tokens; ++token) {
    char* y = static_cast<char*>(pass.y) + (token * w.out_features + row) * y_size;
    for (int64_t panel = 0; panel < last - first; ++panel) {
      float* sum = totals + panel * panel_totals + token * kPanelRows;
      if (pass.bias) {
        for (int64_t r = 0; r < kPanelRows; ++r) sum[r] += bias[panel * kPanelRows + r];
      }
      char* to = y + panel * kPanelRows * y_size;
      // The line of a later token, which no hardware guesses: 2 to 6 % of 128 to 512 tokens of 3072 x 576 with AMX.
      for (int64_t line = 0; line < kPanelRows * y_size; line += 64) __builtin_prefetch(to + 8 * w.out_features * y_size + line, 1);
      const int64_t n = rows - panel * kPanelRows;
      Impl::store(to, sum, pass.x_type, lesser(n, kPanelRows));
    }
  }
}

template <class Impl, class Value, bool kBf16X>
void run_panels(const Pass& pass, int64_t first, int64_t last, float* totals) {
  const Weight& w = pass.weight;
  const int64_t pairs = w.pairs();
  const int64_t panel_totals = pass.tokens * kPanelRows;
  __builtin_memset(totals, 0, size_t((last - first) * panel_totals) * sizeof(float));

  const Value* next[kRunPanels];
  for (int64_t panel = first; panel < last; ++panel) {
    next[panel - first] = static_cast<const Value*>(w.values) + w.offsets[panel];
  }
  for (int64_t block = 0; block < w.blocks(); ++block) {
    const int64_t pair = block * (kBlockK / 2);
    const int64_t n = lesser(kBlockK / 2, pairs - pair);
    for (int64_t panel = first; panel < last; ++panel) {
      const uint32_t* masks = w.masks + (panel * pairs + pair) * 2;
      float* to = totals + (panel - first) * panel_totals;
      const Value*& values = next[panel - first];
      if constexpr (kBf16X) {
        const uint16_t* x = static_cast<const uint16_t*>(pass.work_x) + block * pass.tokens * kRowX;
        values = Impl::block_bf16(values, masks, n, x, pass.tokens, to);
      } else {
        const float* x = static_cast<const float*>(pass.work_x) + block * pass.tokens * kRowX;
        values = Impl::block(values, masks, n, x, pass.tokens, to);
      }
    }
  }

  write_panels<Impl>(pass, first, last, totals, panel_totals);
}

template <class Impl, class Value, bool kBf16X = false>
void run_all(const Pass& pass, int64_t first, int64_t last, float* totals) {
  const int64_t step = pass.tokens > kStreamTokens ? kRunPanels : 1;
  for (int64_t panel = first; panel < last; panel += step) {
    run_panels<Impl, Value, kBf16X>(pass, panel, lesser(panel + step, last), totals);
  }
}

template <class Impl>
void run_by_type(const Pass& pass, int64_t first, int64_t last, float* totals) {
  switch (pass.weight.type) {
    case SPINFER_BF16:
      return run_all<Impl, Bf16>(pass, first, last, totals);
    case SPINFER_F16:
      return run_all<Impl, F16>(pass, first, last, totals);
    default:
      return run_all<Impl, F32>(pass, first, last, totals);
  }
}

// For tiers whose workspace is fp32 whatever the types; with these, `run` is run_by_type<Impl>.
inline bool keeps_fp32(int, int) { return false; }

template <class Impl>
void prepare_fp32(const Pass& pass, int64_t first, int64_t last) {
  prepare_rows<Impl>(pass, first, last, false);
}
