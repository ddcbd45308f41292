// What the ops of one instruction set include from outside. Each isa_<name>.cpp includes it before it switches the
// instruction set on: a function of the standard library compiled with it could end up serving every CPU.
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
