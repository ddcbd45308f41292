// The GPU that a call is for.
#pragma once
#include <atomic>

#include "cuda/common/platform.cuh"

namespace nunchaku_py::cuda {

struct Gpu {
  int multiprocessors = 0, capability = 0;  // 10·major + minor
};

#ifdef __CUDACC__
// Makes a device the current one, and gives the previous one back.
class OnDevice {
  int previous_ = 0;
  bool changed_ = false;

 public:
  explicit OnDevice(int device) {
    check_launch(cudaGetDevice(&previous_));
    changed_ = device != previous_;
    if (changed_) check_launch(cudaSetDevice(device));
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(previous_);
  }
  OnDevice(const OnDevice&) = delete;
};

// Asked of the driver once: this is called before every launch.
inline Gpu gpu(int device) {
  constexpr int KNOWN = 64;
  static std::atomic<Gpu> known[KNOWN];
  Gpu found = device < KNOWN ? known[device].load(std::memory_order_relaxed) : Gpu{};
  if (found.multiprocessors == 0) {
    const auto ask = [device](cudaDeviceAttr what) {
      int value = 0;
      check_launch(cudaDeviceGetAttribute(&value, what, device));
      return value;
    };
    found = {ask(cudaDevAttrMultiProcessorCount),
             10 * ask(cudaDevAttrComputeCapabilityMajor) + ask(cudaDevAttrComputeCapabilityMinor)};
    if (device < KNOWN) known[device].store(found, std::memory_order_relaxed);
  }
  return found;
}
#else
struct OnDevice {
  explicit OnDevice(int) {}
};
inline Gpu gpu(int) {
  return {2, TARGET};  // few multiprocessors, so that small problems have more tiles than the machine has places
}
#endif

}  // namespace nunchaku_py::cuda
