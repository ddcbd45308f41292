// From the kind of codes to kernels.
#pragma once
#include "cuda/linear/host.cuh"
#include "cuda/linear_w4a4/int4.cuh"
#include "cuda/linear_w4a4/nvfp4.cuh"

namespace nunchaku_py::cuda {

// body.operator()<numbers of these codes>()
template <class T>
void with_signed_numbers(Codes codes, auto body) {
  switch (codes) {
    case Codes::int4:
      return body.template operator()<Int4<T, false>>();
    case Codes::nvfp4:
      return body.template operator()<Nvfp4>();
    default:
      throw std::invalid_argument("this ending of linear_w4a4 takes no such codes");
  }
}

template <class T>
void with_numbers(Codes codes, auto body) {
  codes == Codes::uint4 ? body.template operator()<Int4<T, true>>() : with_signed_numbers<T>(codes, body);
}

// With an ending that writes 16 bit.
template <class To>
void launch_any_w4a4(const Calls<To>& calls) {
  const OnDevice here(common(calls).where.device);
  with_type(common(calls).type, [&]<class T>(T) {
    with_numbers<T>(common(calls).codes, [&]<class Numbers>() { launch_linear<T, Numbers>(calls); });
  });
}

}  // namespace nunchaku_py::cuda
