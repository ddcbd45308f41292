#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#include "common.h"
#include "features.h"

namespace nunchaku_py::cpu {

#define NUNCHAKU_PY_DECLARE(isa) \
  namespace isa {                \
  extern const Engine engine;    \
  }
#if defined(__x86_64__) || defined(_M_X64)
#if defined(__x86_64__)
NUNCHAKU_PY_DECLARE(amx)
#endif
NUNCHAKU_PY_DECLARE(amx_emulated)
NUNCHAKU_PY_DECLARE(avx512_bf16)
NUNCHAKU_PY_DECLARE(avx512)
NUNCHAKU_PY_DECLARE(avx_vnni)
NUNCHAKU_PY_DECLARE(avx2)
#endif
NUNCHAKU_PY_DECLARE(portable)

namespace {

constexpr const char* switch_name = "NUNCHAKU_PY_CPU_ISA";

// The first of `needed` that is missing, in words.
std::string obstacle(const std::vector<Feature>& features, std::initializer_list<const char*> needed) {
  for (const std::string name : needed)
    for (const auto& feature : features)
      if (feature.name == name && feature.state != State::usable) {
        if (feature.state == State::not_in_cpu) return "this CPU has no " + name;
        return name + " is in the CPU, but the operating system does not " +
               (feature.state == State::not_enabled ? "enable it" : "permit it");
      }
  return "";
}

#if defined(__x86_64__)
std::string amx_obstacle(const std::vector<Feature>& features, const std::string& without_tiles) {
  if (!without_tiles.empty()) return without_tiles;
  const std::string missing = obstacle(features, {"amx_tile", "amx_int8", "amx_bf16"});
  return missing.empty() && !request_tiles() ? "the operating system refuses AMX to this process" : missing;
}
#endif

std::vector<Isa> find_isas() {
  std::vector<Isa> found;
#if defined(__x86_64__) || defined(_M_X64)
  const auto f = features();
  const auto bf16 = obstacle(f, {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"});
#if defined(__x86_64__)
  found.push_back({"amx", &amx::engine, amx_obstacle(f, bf16)});
#endif
  found.push_back({"avx512_bf16", &avx512_bf16::engine, bf16});
  found.push_back(
      {"avx512", &avx512::engine, obstacle(f, {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"})});
  found.push_back({"avx_vnni", &avx_vnni::engine, obstacle(f, {"avx2", "fma", "f16c", "avx_vnni"})});
  found.push_back({"avx2", &avx2::engine, obstacle(f, {"avx2", "fma", "f16c"})});
#endif
  found.push_back({"portable", &portable::engine, ""});
#if defined(__x86_64__) || defined(_M_X64)
  found.push_back({"amx_emulated", &amx_emulated::engine, bf16});  // only where it is asked for: it is slow
#endif
  return found;
}

const Isa& choose() {
  const char* wanted = std::getenv(switch_name);
  std::string names;
  for (const auto& isa : isas()) {
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
    if (wanted && *wanted ? isa.name != std::string(wanted) : !isa.obstacle.empty()) continue;
    if (!isa.obstacle.empty()) throw std::runtime_error(std::string(switch_name) + "=" + wanted + ": " + isa.obstacle);
    return isa;
  }
  throw std::runtime_error(std::string(switch_name) + ": expected one of " + names + ", got " + wanted);
}

}  // namespace

const std::vector<Isa>& isas() {
  static const std::vector<Isa> found = find_isas();
  return found;
}

const Isa& current_isa() {
  static const Isa& chosen = choose();
  return chosen;
}

}  // namespace nunchaku_py::cpu
