// From the number that names a type to the type.
#pragma once
#include <stdexcept>

#include "cuda/arguments.h"
#include "cuda/common/types.cuh"

namespace nunchaku_py::cuda {

// body(a value of the type)
template <class Body>
void with_type(Type type, Body body) {
  switch (type) {
    case Type::bf16:
      return body(bf16{});
    case Type::f16:
      return body(f16{});
  }
  throw std::invalid_argument("CUDA kernels compute in bfloat16 or float16");
}

}  // namespace nunchaku_py::cuda
