// The way to the kernels for Hopper: their maps, and what clusters do.
#pragma once
#include "cuda/linear/host.cuh"
#include "cuda/linear_w4a8/config_sm90.h"
#include "cuda/linear_w4a8/kernel_sm90.cuh"

namespace nunchaku_py::cuda {

constexpr int SM90 = 90;

// body(tile of so many columns)
template <class Body>
void with_tile_sm90(int columns, Body body) {
  switch (columns) {
    case 256:
      return body(TileSm90<256>{});
    case 192:
      return body(TileSm90<192>{});
    default:
      return body(TileSm90<128>{});
  }
}

template <class Tile>
void set_maps(auto& part, const LinearArguments& a) {
  part.x = tensor_map(a.qx, a.m, a.k, Tile::BM, BOX_BYTES);
  part.w = tensor_map(a.qw, a.n, a.k, Tile::BN / 2, BOX_BYTES);
  if (a.r > 0) part.up = tensor_map(a.up, a.n, a.r * 2, Tile::BN / 2, BOX_BYTES);
}

// make_ending(a, to): the ending of a call.
template <class Tile, class T, class Ending, class To>
void launch_tile_sm90(const Calls<To>& calls, auto make_ending) {
  constexpr int COLUMNS = Tile::BN / PARTS_OF<Ending>;
  GroupSm90<T, Ending> group = {};
  for (const auto& [a, to] : calls) {
    if (a.m == 0) continue;
    PartSm90<T, Ending>& part = group.parts[group.count++];
    const int width = a.n / PARTS_OF<Ending>;
    part.linear = linear_of<T>(a, PARTS_OF<Ending> > 1 ? width - COLUMNS : 0);
    part.ending = make_ending(a, to);
    part.first = group.items, part.rows = pieces(a.m, Tile::BM * Tile::CLUSTER);
    group.items += part.rows * pieces(width, COLUMNS);
    set_maps<Tile>(part, a);
  }
  const Where& where = calls.front().first.where;
  const int clusters = std::min(gpu(where.device).multiprocessors / Tile::CLUSTER, group.items);
  launch_cluster(Tile::CLUSTER, linear_w4a8_sm90_kernel<Tile, T, Ending>, dim3{unsigned(clusters * Tile::CLUSTER)},
                 Tile::THREADS, sizeof(SharedSm90<Tile>), static_cast<stream_t>(where.stream), group);
}

template <class T, class To>
void launch_sm90(const Calls<To>& calls, auto make_ending) {
  using Ending = decltype(make_ending(LinearArguments{}, To{}));
  constexpr bool WHOLE_HEADS = std::is_same_v<Ending, QkvRope<T>>;
  const Gpu here = gpu(common(calls).where.device);
  with_tile_sm90(choose_sm90(problems_of(calls), here, WHOLE_HEADS), [&]<class Tile>(Tile) {
    if constexpr (!WHOLE_HEADS || Tile::BN % SLAB_COLUMNS == 0) launch_tile_sm90<Tile, T, Ending>(calls, make_ending);
  });
}

}  // namespace nunchaku_py::cuda
