// AVX-512 with VBMI2: everything on FMA.
#include "avx512.h"

namespace spinfer {

const Tier kAvx512 = {"avx512", has_avx512, keeps_fp32, prepare_fp32<Avx512>, run_by_type<Avx512>,
                      pack_panel_avx512, pack_panel_avx512};

}  // namespace spinfer
