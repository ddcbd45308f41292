// What the host functions of all endings share: from arguments to the parameters of a kernel, and to its types.
#pragma once
#include <algorithm>

#include "cuda/arguments.h"
#include "cuda/common/device.cuh"
#include "cuda/common/dispatch.cuh"
#include "cuda/linear_w4a4/config.h"
#include "cuda/linear_w4a4/kernel.cuh"

namespace nunchaku_py::cuda {

template <class T>
Linear<T> linear_of(const LinearArguments& a, int jump) {
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
    if (a.type != first.type || a.is_unsigned != first.is_unsigned || a.where.device != first.where.device)
      throw std::invalid_argument("linears of one launch share a device, a type, and the signs of their codes");
  return first;
}

// Launches a kernel on a group of calls. ending_of(a, to): a part's ending; columns_of(a): how many blocks share its
// rows; jump_of(a): Operands::jump.
template <class Tile, class T, class Ending, class To>
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
         is_sm75 ? shared_bytes<Tile, 75>(behind_slab) : shared_bytes<Tile, 80>(behind_slab),
         static_cast<stream_t>(where.stream), group);
}

// With an epilogue that writes y, or what becomes of it, in 16 bit.
template <class T, bool UNSIGNED, class Epilogue, class To>
void launch_linear(const Calls<To>& calls, auto epilogue_of) {
  with_tile(choose(problems_of(calls), gpu(common(calls).where.device)), [&]<class Tile>(Tile) {
    launch_group<Tile>(
        linear_w4a4_kernel<Tile, UNSIGNED, T, Epilogue>, calls, 0, epilogue_of,
        [](const LinearArguments& a) { return pieces(a.n, Tile::BN); }, [](const LinearArguments&) { return 0; });
  });
}

// … of signed or unsigned codes.
template <class T, class Epilogue, class To>
void launch_either(const Calls<To>& calls, auto epilogue_of) {
  common(calls).is_unsigned ? launch_linear<T, true, Epilogue>(calls, epilogue_of)
                            : launch_linear<T, false, Epilogue>(calls, epilogue_of);
}

}  // namespace nunchaku_py::cuda
