// The CPU ops for AVX2 with VNNI; see isa_prelude.h.
#include "isa_prelude.h"

#if defined(__x86_64__) || defined(_M_X64)
#define NUNCHAKU_PY_AVX2
#define NUNCHAKU_PY_AVX_VNNI
#if defined(__clang__)
// clang-format off
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
// clang-format on
#elif defined(__GNUC__)
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif
#define NUNCHAKU_PY_ISA avx_vnni
#include "engine/engine.h"
#include "isa_epilogue.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
