// AVX-512 with VBMI2 and BF16: bf16 x bf16 on vdpbf16ps, everything else as tier_avx512.
#define SPINFER_BF16_TIER
#include "avx512.h"
