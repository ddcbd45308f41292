// What the host functions of all endings share: from arguments to the parameters of a kernel, and to its types.
#pragma once
#include <algorithm>

#include "cuda/arguments.h"
#include "cuda/common/device.cuh"
#include "cuda/common/dispatch.cuh"
#include "cuda/linear/config.h"
#include "cuda/linear/kernel.cuh"

namespace nunchaku_py::cuda {

inline Operands operands_of(const LinearArguments& a, int jump) {
  const auto bytes = [](const void* p) { return static_cast<const uint8_t*>(p); };
  const auto floats = [](const void* p) { return static_cast<const float*>(p); };
  if (a.codes == Codes::int8)
    return {a.qx, a.qw, nullptr, nullptr, floats(a.sx), floats(a.sw), a.m, a.n, a.k / STEP_BYTES, jump};
  return {a.qx, a.qw, bytes(a.sx), bytes(a.sw), nullptr, a.channel_scales, a.m, a.n, a.k / 2 / STEP_BYTES, jump};
}

template <class T>
Linear<T> linear_of(const LinearArguments& a, int jump) {
  return {operands_of(a, jump), {a.h, static_cast<const T*>(a.up), a.r}, a.bias};
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

template <class To>
std::vector<Problem> problems_of(const Calls<To>& calls) {
  std::vector<Problem> problems;
  for (const auto& [a, to] : calls) problems.push_back({a.m, a.n});
  return problems;
}

// What all calls of a launch must have in common, taken from the first.
template <class To>
const LinearArguments& common(const Calls<To>& calls) {
  if (calls.empty() || calls.size() > PARTS)
    throw std::invalid_argument("a launch has 1 to " + std::to_string(PARTS) + " linears");
  const LinearArguments& first = calls.front().first;
  for (const auto& [a, to] : calls)
    if (a.type != first.type || a.codes != first.codes || a.where.device != first.where.device)
      throw std::invalid_argument("linears of one launch share a device, a type, and a kind of codes");
  return first;
}

// Launches a kernel on a group of calls. ending_of(a, to): a part's ending; columns_of(a): how many blocks share its
// rows; jump_of(a): Operands::jump.
template <class Tile, class Numbers, class T, class Ending, class To>
void launch_group(void (*kernel)(Group<T, Ending>), const Calls<To>& calls, int behind_slab, auto ending_of,
                  auto columns_of, auto jump_of) {
  const Where& where = calls.front().first.where;
  Group<T, Ending> group;
  int rows = 0, columns = 0;
  for (size_t i = 0; i < calls.size(); ++i) {
    const auto& [a, to] = calls[i];
    group.parts[i] = {linear_of<T>(a, jump_of(a)), ending_of(a, to)};
    group.first[i] = rows;
    rows += pieces(a.m, Tile::BM), columns = std::max(columns, columns_of(a));
  }
  const bool is_sm75 = gpu(where.device).capability < 80;
  launch(kernel, dim3{unsigned(rows), unsigned(columns)}, Tile::THREADS,
         is_sm75 ? shared_bytes<Tile, Numbers, 75>(behind_slab) : shared_bytes<Tile, Numbers, 80>(behind_slab),
         static_cast<stream_t>(where.stream), group);
}

// ---- the endings, of a call's arguments -----------------------------------------------------------------------------
template <class T>
Store<T> ending_of(const LinearArguments& a, const StoreArguments& to) {
  return {static_cast<T*>(to.y), a.n};
}

template <class T>
GateResidual<T> ending_of(const LinearArguments& a, const GateResidualArguments& to) {
  return {static_cast<T*>(to.y), static_cast<const T*>(to.gate), static_cast<const T*>(to.residual), a.n,
          a.m / to.samples};
}

template <class T>
QkvRope<T> ending_of(const LinearArguments& a, const QkvRopeArguments& to) {
  return {{static_cast<T*>(to.q), static_cast<T*>(to.k), static_cast<T*>(to.v)},
          {to.q_norm, to.k_norm},
          to.rotary,
          a.n,
          to.head_dim,
          to.tokens,
          to.eps};
}

// With an ending that writes y, or what becomes of it, in 16 bit.
template <class T, class Numbers, class To>
void launch_linear(const Calls<To>& calls) {
  using Ending = decltype(ending_of<T>(LinearArguments{}, To{}));
  with_tile(choose(problems_of(calls), gpu(common(calls).where.device)), [&]<class Tile>(Tile) {
    launch_group<Tile, Numbers>(
        linear_kernel<Tile, Numbers, T, Ending>, calls, 0,
        [](const LinearArguments& a, const To& to) { return ending_of<T>(a, to); },
        [](const LinearArguments& a) { return pieces(a.n, Tile::BN); }, [](const LinearArguments&) { return 0; });
  });
}

}  // namespace nunchaku_py::cuda
