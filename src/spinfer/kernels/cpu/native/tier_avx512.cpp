// AVX-512 with VBMI2: vpexpandw and FMA in fp32.
#include "avx512.h"
