// The endings that quantize for the next linear, launched. Their input is signed: it follows no GELU.
#pragma once
#include "cuda/linear/host.cuh"
#include "cuda/linear/next_act.cuh"

namespace nunchaku_py::cuda {

constexpr int SUM_THREADS = 128;

// How the columns of tiles are shared among the blocks of a row of tiles: each goes over so many of them, but the last.
// It depends on all problems of the launch, and with it in how many parts h is summed.
template <class Z>
int tiles_of_blocks(std::span<const Problem> problems, int tile_rows, int multiprocessors) {
  int rows = 0, columns = 0;
  for (const Problem& problem : problems)
    rows += pieces(problem.m, tile_rows), columns = std::max(columns, pieces(Z::width_of(problem.n), Z::WIDTH));
  return tiles_of_block(rows, columns, multiprocessors);
}

template <class Z>
int blocks_of(int n, int tiles) {
  return pieces(pieces(Z::width_of(n), Z::WIDTH), tiles);
}

// Z: Plain<Tile> or Gated<Tile>
template <template <class> class Z>
std::vector<int> parts_of(int device, std::span<const Problem> problems) {
  std::vector<int> parts;
  with_tile(choose(problems, gpu(device)), [&]<class Tile>(Tile) {
    const int tiles = tiles_of_blocks<Z<Tile>>(problems, Tile::BM, gpu(device).multiprocessors);
    for (const Problem& problem : problems) parts.push_back(blocks_of<Z<Tile>>(problem.n, tiles));
  });
  return parts;
}

template <class T>
NextAct<T> next_of(const LinearArguments& a, const NextArguments& to, int width) {
  return {{to.qx, to.sx, a.m, width, to.codes == Codes::uint4},
          to.inv_smooth,
          static_cast<const T*>(to.down),
          to.parts,
          to.shift,
          to.r};
}

inline void sum_parts(const LinearArguments& a, const NextArguments& to, int parts) {
  if (const int size = a.m * to.r)
    launch(sum_hidden_kernel<SUM_THREADS>, dim3{unsigned(pieces(size, SUM_THREADS))}, SUM_THREADS, 0,
           static_cast<stream_t>(a.where.stream), to.parts, parts, to.h, size);
}

template <template <class> class Z, class Numbers, class T>
void launch_next(const Calls<NextArguments>& calls) {
  const auto problems = problems_of(calls);
  const Gpu here = gpu(common(calls).where.device);
  with_tile(choose(problems, here), [&]<class Tile>(Tile) {
    using Made = Z<Tile>;
    const int tiles = tiles_of_blocks<Made>(problems, Tile::BM, here.multiprocessors);
    launch_group<Tile, Numbers>(
        linear_next_kernel<Tile, Numbers, T, Made>, calls, sizeof(Hidden<Tile, T>),
        [&](const LinearArguments& a, const NextArguments& to) {
          return Quantized<T, Made>{next_of<T>(a, to, Made::width_of(a.n)), {to.activation, to.gate_first}, tiles};
        },
        [&](const LinearArguments& a) { return blocks_of<Made>(a.n, tiles); },
        [](const LinearArguments& a) { return Made::jump_of(a.n); });
    for (const auto& [a, to] : calls) sum_parts(a, to, blocks_of<Made>(a.n, tiles));
  });
}

}  // namespace nunchaku_py::cuda
