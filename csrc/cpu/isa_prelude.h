// Everything that the ops include from outside: see isa_avx512.cpp.
#pragma once
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "arguments.h"
#include "isa.h"
#include "parallel.h"
#include "scalar.h"
#include "scratch.h"
