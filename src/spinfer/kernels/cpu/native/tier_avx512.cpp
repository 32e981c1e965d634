// AVX-512 with VBMI2: everything on FMA.
#include "avx512.h"

namespace spinfer {
namespace {

bool keeps_bf16(int, int) { return false; }
void prepare(const Pass& pass, int64_t first, int64_t last) { prepare_rows<Avx512>(pass, first, last, false); }
void run(const Pass& pass, int64_t first, int64_t last, float* totals) {
  run_by_type<Avx512>(pass, first, last, totals);
}

}  // namespace

const Tier kAvx512 = {"avx512", has_avx512, keeps_bf16, prepare, run, pack_panel_avx512, pack_panel_avx512};

}  // namespace spinfer
