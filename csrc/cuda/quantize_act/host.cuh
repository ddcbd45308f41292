// From arguments to a kernel that quantizes.
#pragma once
#include "cuda/arguments.h"
#include "cuda/common/device.cuh"
#include "cuda/common/dispatch.cuh"
#include "cuda/quantize_act/kernel.cuh"

namespace nunchaku_py::cuda {

constexpr int QUANTIZE_WARPS = 4;

// RANKS: of h that a block makes from its one read of x.
template <int RANKS, class T, class Source>
void launch_ranks(const QuantizeArguments& a, const Source& source) {
  const auto typed = [](const void* p) { return static_cast<const T*>(p); };
  const QuantizeParams<T> p = {typed(a.x), a.inv_smooth, typed(a.down), a.qx, static_cast<T*>(a.sx), a.h,
                               a.shift,    a.m,          a.k,           a.r,  a.is_unsigned};
  const auto blocks_of = [](int size, int piece) { return unsigned((size + piece - 1) / piece); };
  const dim3 grid{blocks_of(a.m, 16), a.r > 0 ? blocks_of(a.r, RANKS) : 1};
  launch(quantize_act_kernel<T, RANKS, QUANTIZE_WARPS, Source>, grid, QUANTIZE_WARPS * 32,
         quantize_act_bytes<RANKS, QUANTIZE_WARPS>(), static_cast<stream_t>(a.where.stream), p, source);
}

template <class T, class Source>
void launch_quantize(const QuantizeArguments& a, const Source& source) {
  if (a.r <= 32)
    launch_ranks<32, T>(a, source);
  else if (a.r <= 64)
    launch_ranks<64, T>(a, source);
  else
    launch_ranks<128, T>(a, source);
}

}  // namespace nunchaku_py::cuda
