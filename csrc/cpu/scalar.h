// Single numbers of the storage types. Out of line on purpose: files compiled for different instruction sets share
// them.
#pragma once
#include <cstdint>

namespace nunchaku_py::cpu {

float bf16_value(std::uint16_t bits);
float f16_value(std::uint16_t bits);
extern const float (&e4m3_values)[256];

// Rounded half to even. Numbers too large become infinite; e4m3, which has no infinity, NaN.
std::uint16_t bf16_bits(float value);
std::uint16_t f16_bits(float value);
std::uint8_t e4m3_bits(float value);

}  // namespace nunchaku_py::cpu
