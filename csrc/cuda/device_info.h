#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace nunchaku_py::cuda {

struct Device {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  std::uint64_t memory = 0;  // bytes
  int target = 0;            // the compiled target that ran there, as 10*major + minor; 0: none of them runs
  std::string problem;       // why none runs
};

// Why the driver of this machine runs nothing that was built here, or "". Asks the driver for its version only.
std::string why_not_this_driver();

// Looks for GPUs and runs a one-thread kernel on each. Throws std::runtime_error with the driver's words if there are
// none.
std::vector<Device> devices();

}  // namespace nunchaku_py::cuda
