// What the inner loop's instructions reach with all operands in registers: the ceiling that benchmarks measure against.
#pragma once
#include "product.h"

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

constexpr int chains = W == 16 ? 12 : 10;

template <class Dot>
double seconds_of(std::int64_t turns) {
  const auto begin = std::chrono::steady_clock::now();
#if defined(NUNCHAKU_PY_AMX)
  if constexpr (Dot::in_tiles) {
    const TileScope scope;
    Tiles::zero<4>(), Tiles::zero<5>(), Tiles::zero<6>(), Tiles::zero<7>();
    for (std::int64_t i = 0; i < turns; i++) {
      Dot::template dot<0, 4, 6>(), Dot::template dot<1, 4, 7>();
      Dot::template dot<2, 5, 6>(), Dot::template dot<3, 5, 7>();
    }
  }
#endif
  if constexpr (!Dot::in_tiles) {
    typename Dot::Scalar out[W];
    typename Dot::Vector acc[chains];
    I column = Simd::set1_int(static_cast<std::int32_t>(turns));
    for (int j = 0; j < chains; j++) acc[j] = Dot::zero();
    for (std::int64_t i = 0; i < turns; i++)
#pragma GCC unroll 16
      for (int j = 0; j < chains; j++) {
        Simd::hide(column);
        acc[j] = Dot::dot(acc[j], column, static_cast<std::int32_t>(turns));
      }
    for (int j = 0; j < chains; j++) {
      Dot::store(out, acc[j]);
      volatile typename Dot::Scalar used = out[0];
      static_cast<void>(used);
    }
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// GOP/s of one thread, the best of some short runs: others may use the machine.
template <class Dot>
double peak_of() {
  const double operations =
      Dot::in_tiles ? 4.0 * 2 * 16 * 16 * 16 * Dot::per_word : double{chains} * 2 * W * Dot::per_word;
  std::int64_t turns = 1000;
  while (seconds_of<Dot>(turns) < 2e-3) turns *= 2;
  double least = 1e9;
  for (int i = 0; i < 10; i++) {
    const double s = seconds_of<Dot>(turns);
    least = s < least ? s : least;
  }
  return operations * static_cast<double>(turns) / least * 1e-9;
}

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
