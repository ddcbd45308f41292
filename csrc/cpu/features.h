#pragma once
#include <vector>

namespace nunchaku_py::cpu {

enum class State {
  usable,
  not_in_cpu,
  not_enabled,   // the CPU has it, the operating system does not save its registers
  not_permitted  // the operating system keeps it from this process
};

struct Feature {
  const char* name;
  State state;
};

// The instruction sets that kernels choose by, of the CPU this runs on. Empty on anything but 64-bit x86.
std::vector<Feature> features();

}  // namespace nunchaku_py::cpu
