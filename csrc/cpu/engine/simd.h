// The vector operations of the instruction set that this file is compiled for.
#pragma once
#include "../scalar.h"

#if defined(NUNCHAKU_PY_AVX512)
#include "../simd/avx512.h"
#elif defined(NUNCHAKU_PY_AVX2)
#include "../simd/avx2.h"
#else
#include "../simd/portable.h"
#endif
#if defined(NUNCHAKU_PY_AMX)
#include "../simd/tiles.h"
#endif
