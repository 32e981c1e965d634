// AVX-512 with VBMI2 and BF16: bf16 x bf16 on vdpbf16ps, everything else as tier_avx512.
#define SPINFER_BF16_TIER
#include "avx512.h"

namespace spinfer {
namespace {

bool supported() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool keeps_bf16(int type, int x_type) { return type == SPINFER_BF16 && x_type == SPINFER_BF16; }
void prepare(const Pass& pass, int64_t first, int64_t last) {
  prepare_rows<Avx512>(pass, first, last, keeps_bf16(pass.weight.type, pass.x_type));
}
void run(const Pass& pass, int64_t first, int64_t last, float* totals) {
  if (keeps_bf16(pass.weight.type, pass.x_type)) return run_all<Avx512, Bf16, true>(pass, first, last, totals);
  run_by_type<Avx512>(pass, first, last, totals);
}

}  // namespace

const Tier kAvx512Bf16 = {"avx512bf16", supported, keeps_bf16, prepare, run, pack_panel_avx512, pack_panel_avx512};

}  // namespace spinfer
