// What compilers and operating systems do differently about a CPU. Everything else in csrc/cpu is portable C++.
#pragma once
#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#define NUNCHAKU_PY_X86 1
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#else
#define NUNCHAKU_PY_X86 0
#endif

namespace nunchaku_py::cpu {
#if NUNCHAKU_PY_X86

struct Cpuid {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zeros for a leaf that this CPU does not have.
inline Cpuid cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
  Cpuid r;
#if defined(_MSC_VER)
  int words[4];
  __cpuid(words, 0);
  if (leaf > static_cast<std::uint32_t>(words[0])) return r;
  __cpuidex(words, static_cast<int>(leaf), static_cast<int>(subleaf));
  r.eax = static_cast<std::uint32_t>(words[0]);
  r.ebx = static_cast<std::uint32_t>(words[1]);
  r.ecx = static_cast<std::uint32_t>(words[2]);
  r.edx = static_cast<std::uint32_t>(words[3]);
#else
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
  return r;
}

// XCR0: the register states that the operating system saves. Call only where cpuid leaf 1 has OSXSAVE.
inline std::uint64_t enabled_states() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  // Inline because the _xgetbv intrinsic would ask for -mxsave on the whole file.
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
#endif
}

// Linux (5.16 and newer) gives AMX tiles only to processes that ask; this looks whether it would, and asks for nothing.
inline bool tiles_granted_on_request() {
#if defined(__linux__)
  constexpr int get_supported_states = 0x1021;  // ARCH_GET_XCOMP_SUPP
  constexpr std::uint64_t tile_data = 1ull << 18;
  std::uint64_t states = 0;
  return syscall(SYS_arch_prctl, get_supported_states, &states) == 0 && (states & tile_data) != 0;
#else
  return true;
#endif
}

// And this asks for them, for all threads of the process.
inline bool request_tiles() {
#if defined(__linux__)
  constexpr int request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return true;
#endif
}

#endif
}  // namespace nunchaku_py::cpu
