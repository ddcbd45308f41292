// How Python calls kernels (build.py is the other side): a library exports functions that take a Call, tensors and
// numbers, and return what went wrong, or null.
#pragma once
#include <cstdint>
#include <cstring>
#include <string>

#include "simt.h"

#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))

namespace simt {

struct Call {
  std::int32_t race, trap, reverse, truncate, workers, eager;             // Options
  std::int64_t ldmatrix_phases = 0, ldmatrix_matrices = 0, switches = 0;  // what was counted
};

struct Array {  // a contiguous tensor
  void* data;
  std::int64_t bytes;
};

// A tensor as global memory of exactly its size: kernels read a copy.
template <class T>
class Input : public Buffer<T> {
 public:
  Input(const char* name, Array array) : Buffer<T>(name, array.bytes / sizeof(T), false) {
    if (array.bytes) std::memcpy(static_cast<void*>(this->data()), array.data, array.bytes);
  }
};

// Kernels read and write a copy, which goes back into the tensor when it ends.
template <class T>
class Output : public Buffer<T> {
 public:
  Output(const char* name, Array array) : Buffer<T>(name, array.bytes / sizeof(T), true), array_(array) {
    if (array.bytes) std::memcpy(static_cast<void*>(this->data()), array.data, array.bytes);
  }
  ~Output() {
    if (array_.bytes) std::memcpy(array_.data, this->data(), array_.bytes);
  }

 private:
  const Array array_;
};

template <class Body>
const char* run(Call& call, Body body) {
  static thread_local std::string sentence;
  options = {call.race != 0, call.trap != 0, call.reverse != 0, call.truncate != 0, call.workers,
             call.eager != 0};
  ldmatrix_phases = ldmatrix_matrices = switches = 0;
  const char* result = nullptr;
  try {
    body();
  } catch (const std::exception& error) {
    sentence = error.what();
    result = sentence.c_str();
  }
  options = {};
  call.ldmatrix_phases = ldmatrix_phases, call.ldmatrix_matrices = ldmatrix_matrices, call.switches = switches;
  return result;
}

}  // namespace simt
