// From arguments to a kernel that quantizes.
#pragma once
#include "cuda/arguments.h"
#include "cuda/common/device.cuh"
#include "cuda/common/dispatch.cuh"
#include "cuda/quantize_act/kernel.cuh"

namespace nunchaku_py::cuda {

constexpr int QUANTIZE_WARPS = 8;  // so many bytes are under way that memory is kept busy

// RANKS: of h that a block makes from its one read of x.
template <int RANKS, class T, class To, class Source>
void launch_ranks(const QuantizeArguments& a, const Source& source) {
  const auto typed = [](const void* p) { return static_cast<const T*>(p); };
  const QuantizeParams<T> p = {{a.qx, a.sx, a.m, a.k, a.codes == Codes::uint4},
                               typed(a.x),
                               a.inv_smooth,
                               typed(a.down),
                               a.h,
                               a.tops,
                               a.shift,
                               a.r};
  const auto blocks_of = [](int size, int piece) { return unsigned((size + piece - 1) / piece); };
  const dim3 grid{blocks_of(a.m, 16), a.r > 0 ? blocks_of(a.r, RANKS) : 1};
  launch(quantize_act_kernel<T, RANKS, QUANTIZE_WARPS, Source, To>, grid, QUANTIZE_WARPS * 32,
         quantize_act_bytes<RANKS, QUANTIZE_WARPS>(), static_cast<stream_t>(a.where.stream), p, source);
}

template <class T, class To, class Source>
void launch_codes(const QuantizeArguments& a, const Source& source) {
  if (a.r <= 32)
    launch_ranks<32, T, To>(a, source);
  else if (a.r <= 64)
    launch_ranks<64, T, To>(a, source);
  else
    launch_ranks<128, T, To>(a, source);
}

template <class T, class Source>
void launch_quantize(const QuantizeArguments& a, const Source& source) {
  switch (a.codes) {
    case Codes::int4:
    case Codes::uint4:
      return launch_codes<T, InGroups<ToInt4<T>>>(a, source);
    case Codes::nvfp4:
      return launch_codes<T, InGroups<ToNvfp4>>(a, source);
    case Codes::int8:
      return launch_codes<T, InRows<false>>(a, source);
    default:
      throw std::invalid_argument("no kernel quantizes to these codes");
  }
}

}  // namespace nunchaku_py::cuda
