// The CPU ops for AMX, on top of AVX-512 with VNNI and BF16; see isa_prelude.h.
#include "isa_prelude.h"

#if defined(__x86_64__)  // MSVC has no inline assembler there
#define NUNCHAKU_PY_AMX
#define NUNCHAKU_PY_AVX512
#define NUNCHAKU_PY_AVX512_BF16
#if defined(__clang__)
// clang-format off
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c"))), apply_to = function)
// clang-format on
#elif defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")
#endif
#define NUNCHAKU_PY_ISA amx
#include "engine/engine.h"
#include "isa_epilogue.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
