// The GPU that a call is for.
#pragma once
#include <atomic>

#include "cuda/common/platform.cuh"

namespace nunchaku_py::cuda {

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
inline int multiprocessors(int device) {
  constexpr int KNOWN = 64;
  static std::atomic<int> known[KNOWN];
  int count = device < KNOWN ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    check_launch(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    if (device < KNOWN) known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}
#else
struct OnDevice {
  explicit OnDevice(int) {}
};
inline int multiprocessors(int) {
  return 2;  // few, so that small problems have more tiles than the machine has places
}
#endif

}  // namespace nunchaku_py::cuda
