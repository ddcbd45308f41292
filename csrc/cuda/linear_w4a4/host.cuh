// What the host functions of all endings share: from arguments to the parameters of a kernel, and to its types.
#pragma once
#include "cuda/arguments.h"
#include "cuda/common/device.cuh"
#include "cuda/common/dispatch.cuh"
#include "cuda/linear_w4a4/config.h"
#include "cuda/linear_w4a4/kernel_sm80.cuh"

namespace nunchaku_py::cuda {

template <class T>
Linear<T> linear_of(const LinearArguments& a, int jump = 0) {
  const auto typed = [](const void* p) { return static_cast<const T*>(p); };
  return {{a.qx, a.qw, typed(a.sx), typed(a.sw), a.m, a.n, a.k, jump}, {a.h, typed(a.up), a.r}, a.bias};
}

// body(tile of the chosen kind)
template <class Body>
void with_tile(Choice choice, Body body) {
  switch (choice) {
    case Choice::large:
      return body(Large{});
    case Choice::medium:
      return body(Medium{});
    case Choice::small:
      return body(Small{});
  }
}

// With an epilogue that writes y, or what becomes of it, in 16 bit.
template <class T, bool UNSIGNED, class Epilogue>
void launch_linear(const LinearArguments& a, const Epilogue& epilogue) {
  with_tile(choose({a.m, a.n}, multiprocessors(a.where.device)), [&]<class Tile>(Tile) {
    const dim3 grid{unsigned(pieces(a.m, Tile::BM)), unsigned(pieces(a.n, Tile::BN))};
    launch(linear_w4a4_kernel<Tile, UNSIGNED, T, Epilogue>, grid, Tile::THREADS, shared_bytes<Tile>(),
           static_cast<stream_t>(a.where.stream), linear_of<T>(a), epilogue);
  });
}

// … of signed or unsigned codes.
template <class T, class Epilogue>
void launch_either(const LinearArguments& a, const Epilogue& epilogue) {
  a.is_unsigned ? launch_linear<T, true>(a, epilogue) : launch_linear<T, false>(a, epilogue);
}

}  // namespace nunchaku_py::cuda
