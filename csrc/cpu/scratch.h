// Memory for one call, kept by its thread for the next: fresh pages cost more than the arithmetic they serve.
#pragma once
#include <cstddef>

namespace nunchaku_py::cpu {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();

  // At least `bytes` and some to read past the end, aligned to a cache line. What an earlier call wrote is void.
  void* get(std::size_t bytes);

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace nunchaku_py::cpu
