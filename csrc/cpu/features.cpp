#include "features.h"

#include "common.h"

namespace nunchaku_py::cpu {
#if NUNCHAKU_PY_X86

namespace {

constexpr std::uint64_t avx_states = 0x6;      // XCR0: XMM, YMM
constexpr std::uint64_t avx512_states = 0xE6;  // and opmask, ZMM
constexpr std::uint64_t amx_states = 0x60000;  // tile configuration, tile data

constexpr bool bit(std::uint32_t word, int index) {
  return (word >> index) & 1u;
}

State state(bool in_cpu, std::uint64_t enabled, std::uint64_t needed) {
  if (!in_cpu) return State::not_in_cpu;
  if ((enabled & needed) != needed) return State::not_enabled;
  if (needed == amx_states && !tiles_granted_on_request()) return State::not_permitted;
  return State::usable;
}

}  // namespace

std::vector<Feature> features() {
  const Cpuid basic = cpuid(1, 0), extended = cpuid(7, 0), more = cpuid(7, 1);
  const std::uint64_t enabled = bit(basic.ecx, 27) ? enabled_states() : 0;  // OSXSAVE
  return {
      {"avx2", state(bit(extended.ebx, 5), enabled, avx_states)},
      {"fma", state(bit(basic.ecx, 12), enabled, avx_states)},
      {"f16c", state(bit(basic.ecx, 29), enabled, avx_states)},
      {"avx_vnni", state(bit(more.eax, 4), enabled, avx_states)},
      {"avx512f", state(bit(extended.ebx, 16), enabled, avx512_states)},
      {"avx512bw", state(bit(extended.ebx, 30), enabled, avx512_states)},
      {"avx512dq", state(bit(extended.ebx, 17), enabled, avx512_states)},
      {"avx512vl", state(bit(extended.ebx, 31), enabled, avx512_states)},
      {"avx512_vnni", state(bit(extended.ecx, 11), enabled, avx512_states)},
      {"avx512_bf16", state(bit(more.eax, 5), enabled, avx512_states)},
      {"amx_tile", state(bit(extended.edx, 24), enabled, amx_states)},
      {"amx_int8", state(bit(extended.edx, 25), enabled, amx_states)},
      {"amx_bf16", state(bit(extended.edx, 22), enabled, amx_states)},
  };
}

#else

std::vector<Feature> features() {
  return {};
}

#endif
}  // namespace nunchaku_py::cpu
