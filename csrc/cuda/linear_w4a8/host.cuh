// The way to the kernels of linear_w4a8.
#pragma once
#include "cuda/linear/host.cuh"
#include "cuda/linear_w4a8/activated.cuh"
#include "cuda/linear_w4a8/host_sm90.cuh"
#include "cuda/linear_w4a8/int8.cuh"
#include "cuda/quantize_act/host.cuh"

namespace nunchaku_py::cuda {

// With an ending that writes 16 bit.
template <class To>
void launch_w4a8(const Calls<To>& calls) {
  const OnDevice here(common(calls).where.device);
  with_type(common(calls).type, [&]<class T>(T) {
    if (gpu(common(calls).where.device).capability != SM90) return launch_linear<T, Int8>(calls);
    launch_sm90<T>(calls, [](const LinearArguments& a, const To& to) { return ending_of<T>(a, to); });
  });
}

// z, whose rows are complete, to INT8.
template <class T>
void quantize_activated(const LinearArguments& a, const NextArguments& to, int width) {
  QuantizeArguments next;
  next.where = a.where, next.type = a.type, next.m = a.m, next.k = width, next.r = to.r;
  next.x = to.z, next.inv_smooth = to.inv_smooth, next.down = to.down, next.tops = to.tops;
  next.codes = Codes::int8, next.qx = to.qx, next.sx = to.sx, next.h = to.h;
  launch_codes<T, InRows<true>>(next, AsItIs<T>{});
}

// Made: how z is made of y.
template <class T, class Made>
Activated<T, Made> activated_of(const LinearArguments& a, const NextArguments& to, int width) {
  return {static_cast<T*>(to.z), to.tops, to.inv_smooth, a.m, width, {to.activation, to.gate_first}};
}

// Z: Plain<Tile> or Gated<Tile>
template <template <class> class Z, class T>
void launch_activated(const Calls<NextArguments>& calls) {
  with_tile(choose(problems_of(calls), gpu(common(calls).where.device)), [&]<class Tile>(Tile) {
    using Made = Z<Tile>;
    launch_group<Tile, Int8>(
        linear_activated_kernel<Tile, Int8, T, Made>, calls, 0,
        [](const LinearArguments& a, const NextArguments& to) {
          return activated_of<T, Made>(a, to, Made::width_of(a.n));
        },
        [](const LinearArguments& a) { return pieces(Made::width_of(a.n), Made::WIDTH); },
        [](const LinearArguments& a) { return Made::jump_of(a.n); });
  });
}

// … MadeSm90: PlainSm90 or GatedSm90.
template <template <class> class Z, class MadeSm90>
void launch_next_int8(const Calls<NextArguments>& calls) {
  const OnDevice here(common(calls).where.device);
  with_type(common(calls).type, [&]<class T>(T) {
    if (gpu(common(calls).where.device).capability == SM90)
      launch_sm90<T>(calls, [](const LinearArguments& a, const NextArguments& to) {
        return activated_of<T, MadeSm90>(a, to, a.n / MadeSm90::PARTS);
      });
    else
      launch_activated<Z, T>(calls);
    for (const auto& [a, to] : calls)
      if (a.m > 0) quantize_activated<T>(a, to, a.n / MadeSm90::PARTS);
  });
}

}  // namespace nunchaku_py::cuda
