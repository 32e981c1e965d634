// The driver: tiers, threads, workspace, and the passes of spinfer_cpu_linear.
#include <stdlib.h>

#include "kernel.h"
#include "parallel.h"

namespace spinfer {

std::atomic<spinfer_pool_t> g_pool{nullptr};

namespace {

constexpr const Tier* kTiers[] = {
#if defined(__x86_64__) || defined(_M_X64)
#ifdef SPINFER_AMX
    &kAmx,
#endif
    &kAvx512Bf16,
    &kAvx512,
    &kAvx2,
#endif
    &kScalar,
};
constexpr int kTierCount = int(sizeof(kTiers) / sizeof(kTiers[0]));

}  // namespace

const Tier* usable_tier(int index) {
  return index >= 0 && index < kTierCount && kTiers[index]->supported() ? kTiers[index] : nullptr;
}

namespace {

// Most bytes of values and masks that a thread takes at a time. Long runs keep the prefetch going (300 KiB: 2 to 5 %
// slower); towards the end they get shorter, so that the threads finish together.
constexpr int64_t kRunBytes = 1200 << 10;

// Below this many multiply-adds a second thread brings nothing (192 x 576 and 320 x 640 at N = 1 take 7 and 9 us either
// way), and where other processes keep the cores busy it costs a scheduler slice.
constexpr int64_t kSerialWork = 1 << 18;

// Grows with the largest problem of its thread, and lives as long: no page faults in the steady state.
class Workspace {
 public:
  ~Workspace() { free(base_); }

  void* get(size_t nbytes) {
    if (nbytes > nbytes_) {
      free(base_);
      nbytes_ = (nbytes + 4095) & ~size_t(4095);
      base_ = aligned_alloc(64, nbytes_);
      if (!base_) nbytes_ = 0;
    }
    return base_;
  }

 private:
  void* base_ = nullptr;
  size_t nbytes_ = 0;
};

thread_local Workspace t_workspace;

int64_t align64(int64_t nbytes) { return (nbytes + 63) & ~int64_t(63); }

struct Job {
  const Tier* tier;
  Pass pass;
  int threads;
  int64_t most_run;  // panels
  char* totals;
  int64_t totals_nbytes;  // of one thread
  std::atomic<int64_t> next{0};
};

void work(Job& job, int thread) {
  float* totals = reinterpret_cast<float*>(job.totals + thread * job.totals_nbytes);
  const int64_t panels = job.pass.weight.panels();
  int64_t first = job.next.load(std::memory_order_relaxed);
  for (;;) {
    if (first >= panels) return;
    int64_t run = (panels - first) / (2 * job.threads);
    run = run < 1 ? 1 : run > job.most_run ? job.most_run : run;
    const int64_t last = first + run < panels ? first + run : panels;
    if (!job.next.compare_exchange_weak(first, last, std::memory_order_relaxed)) continue;
    job.tier->run(job.pass, first, last, totals);
    first = job.next.load(std::memory_order_relaxed);
  }
}

int linear(const Tier& tier, Pass pass, int64_t tokens, int threads) {
  const Weight& w = pass.weight;
  const int64_t x_size = pass.x_type == SPINFER_F32 ? 4 : 2;
  const int64_t pass_tokens = tokens < tier.pass_tokens ? tokens : tier.pass_tokens;
  const int64_t padded = padded_tokens(pass_tokens);
  const int64_t work_size = tier.keeps_bf16(w.type, pass.x_type) ? 2 : 4;
  if (w.out_features * w.in_features * tokens < kSerialWork || threads < 1) threads = 1;

  const int64_t work_nbytes = align64(w.blocks() * padded * kRowX * work_size);
  const bool many = pass_tokens > kStreamTokens;
  Job job{&tier, pass, threads, 1, nullptr, align64((many ? kRunPanels : 1) * padded * kPanelRows * 4)};
  char* base = static_cast<char*>(t_workspace.get(size_t(work_nbytes + threads * job.totals_nbytes)));
  if (!base) return SPINFER_OUT_OF_MEMORY;
  job.pass.work_x = base;
  job.totals = base + work_nbytes;

  const int64_t panels = w.panels();
  const int64_t value_size = w.type == SPINFER_F32 ? 4 : 2;
  const int64_t panel_nbytes = ((w.offsets[panels] - w.offsets[0]) * value_size) / panels + w.pairs() * 8 + 1;
  job.most_run = kRunBytes / panel_nbytes > 1 ? kRunBytes / panel_nbytes : 1;

  for (int64_t token = 0; token < tokens; token += pass_tokens) {
    job.pass.x = static_cast<const char*>(pass.x) + token * pass.x_stride * x_size;
    job.pass.y = static_cast<char*>(pass.y) + token * w.out_features * x_size;
    job.pass.tokens = tokens - token < pass_tokens ? tokens - token : pass_tokens;
    const int64_t from = tier.first_to_prepare ? tier.first_to_prepare(job.pass) : 0;
    const int64_t rows = job.pass.tokens - from;
    const bool much = rows * w.in_features > (1 << 15);
    const int64_t part = (rows + 4 * threads - 1) / (4 * threads);
    parallel_for(much ? threads : 1, rows, much ? part : rows,
                 [&](int64_t first, int64_t last) { tier.prepare(job.pass, from + first, from + last); });
    job.next.store(0, std::memory_order_relaxed);
    on_threads<Job>(threads, job, work);
  }
  return 0;
}

}  // namespace
}  // namespace spinfer

using namespace spinfer;

extern "C" {

int spinfer_cpu_abi(void) { return SPINFER_CPU_ABI; }

const char* spinfer_cpu_message(int result) {
  switch (result) {
    case 0:
      return "done";
    case SPINFER_OUT_OF_MEMORY:
      return "out of memory";
    case SPINFER_BAD_OFFSETS:
      return "the offsets disagree with the bitmap or with the number of values";
    case SPINFER_BAD_NNZ:
      return "the bitmap does not count nnz nonzeros";
    case SPINFER_BITS_OUTSIDE:
      return "the bitmap has bits set outside the matrix";
    case SPINFER_BAD_PADDING:
      return "a GroupTile's values are padded with something else than zeros";
    default:
      return "an argument is out of range";
  }
}

int spinfer_cpu_tiers(void) { return kTierCount; }

const char* spinfer_cpu_tier_name(int tier) { return tier >= 0 && tier < kTierCount ? kTiers[tier]->name : nullptr; }

int spinfer_cpu_tier_supported(int tier) { return usable_tier(tier) != nullptr; }

int spinfer_cpu_tier_best(void) {
  int tier = 0;
  while (!kTiers[tier]->supported()) ++tier;
#if defined(__x86_64__) || defined(_M_X64)
  // vdpbf16ps starts every second cycle or slower on Intel's Golden Cove, at half the rate of two FMAs; on Zen 4 it starts
  // every cycle, twice the rate.
  __builtin_cpu_init();
  if (kTiers[tier] == &kAvx512Bf16 && !__builtin_cpu_is("amd")) ++tier;
#endif
  return tier;
}

void spinfer_cpu_set_pool(spinfer_pool_t pool) { g_pool.store(pool); }

int spinfer_cpu_linear(int tier, const void* values, const uint32_t* masks, const int64_t* offsets, int64_t out_features,
                       int64_t in_features, int type, const void* x, int64_t x_stride, int64_t tokens, int x_type,
                       const void* bias, void* y, int threads) {
  const Tier* usable = usable_tier(tier);
  const bool types = type >= SPINFER_BF16 && type <= SPINFER_F32 && x_type >= SPINFER_BF16 && x_type <= SPINFER_F32;
  if (!usable || !types || out_features < 1 || in_features < 1 || tokens < 1) return SPINFER_BAD_ARGUMENT;
  if (const Tier* other = usable->instead ? usable->instead(type, x_type, tokens) : nullptr) usable = other;
  const Weight weight{values, masks, offsets, out_features, in_features, type};
  return linear(*usable, Pass{weight, x, x_stride, tokens, x_type, bias, y, nullptr}, tokens, threads);
}

uint64_t spinfer_cpu_read(const void* bytes, int64_t nbytes, int threads) {
  constexpr int64_t kWords = 32;
  const uint64_t* words = static_cast<const uint64_t*>(bytes);
  std::atomic<uint64_t> result{0};
  parallel_for(threads, nbytes / (8 * kWords), kRunBytes / (8 * kWords), [&](int64_t begin, int64_t end) {
    uint64_t sums[kWords] = {};
    for (int64_t i = begin; i < end; ++i) {
      // 8 KiB ahead: of none, 1 to 12 KiB into L1 and pairs of distances the fastest on Zen 4 (36 GB/s a core; 33 without).
      for (int64_t j = 0; j < kWords; j += 8) __builtin_prefetch(words + (i + 32) * kWords + j);
      for (int64_t j = 0; j < kWords; ++j) sums[j] ^= words[i * kWords + j];
    }
    for (int64_t j = 1; j < kWords; ++j) sums[0] ^= sums[j];
    result.fetch_xor(sums[0], std::memory_order_relaxed);
  });
  return result.load();
}

}  // extern "C"
