// Functions that the GPU has as one inexact instruction. How inexact is the PTX ISA's word; the host model is exact, or
// (simt::Options::truncate) as much too small as allowed, so that a test under both knows what its tolerance has to
// cover.
#pragma once
#include "cuda/common/platform.cuh"

namespace nunchaku_py::cuda {

// 2ˣ to 2 units in the last place; results below 2⁻¹²⁶ are zero.
DEVICE float ex2_approx(float x) {
#ifndef __CUDACC__
  return simt::approximate(std::exp2(double(x)), 0x1p-22);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// tanh x with a relative error of 2⁻¹¹.
DEVICE float tanh_approx(float x) {
#ifndef __CUDACC__
  return simt::approximate(std::tanh(double(x)), 0x1p-11);
#else
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1/x to 1 unit in the last place; what is below 2⁻¹²⁶ counts as zero. Where references divide, write x / y: that is
// exact.
DEVICE float rcp_approx(float x) {
#ifndef __CUDACC__
  return simt::approximate(1 / double(simt::without_subnormals(x)), 0x1p-23);
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace nunchaku_py::cuda
