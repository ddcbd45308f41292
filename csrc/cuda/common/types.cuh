// The 16-bit and 8-bit types of tensors, for storage: arithmetic is done in float (convert.cuh). CUDA's own have no twin
// on hosts.
#pragma once
#include <cstdint>

namespace nunchaku_py::cuda {

enum class bf16 : uint16_t {};
enum class f16 : uint16_t {};
enum class e4m3 : uint8_t {};

}  // namespace nunchaku_py::cuda
