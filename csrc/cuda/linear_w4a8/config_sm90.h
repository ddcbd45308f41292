// Which tile for which problem on Hopper: data, and a function that needs no GPU.
#pragma once
#include <span>

#include "cuda/arguments.h"
#include "cuda/common/device.cuh"
#include "cuda/linear/config.h"
#include "cuda/linear_w4a8/tile_sm90.h"

namespace nunchaku_py::cuda {

struct TileCostSm90 {
  int columns;
  double column;  // time of a column against those of the widest tile; an estimate: what is read for each product
};
inline constexpr TileCostSm90 TILES_SM90[] = {{256, 1.0}, {192, 1.04}, {128, 1.15}};
constexpr double ENDING_SM90 = 20;  // what follows a tile's products, in columns; an estimate

// Items of a problem, `parts` columns of y being one of what is made of it.
constexpr int items_of(const Problem& problem, int columns) {
  return pieces(problem.m, TileSm90<256>::BM * TileSm90<256>::CLUSTER) * pieces(problem.n, columns);
}

// The columns of the tile with which the cluster that has most to do is done first; of equals the wider. whole_heads:
// 128 neighbours of y lie in one tile.
constexpr int choose_sm90(std::span<const Problem> problems, Gpu gpu, bool whole_heads = false) {
  const int clusters = gpu.multiprocessors / TileSm90<256>::CLUSTER;
  int best = 0;
  double least = 0;
  for (const TileCostSm90& tile : TILES_SM90) {
    if (whole_heads && tile.columns % 128) continue;
    int items = 0;
    for (const Problem& problem : problems) items += items_of(problem, tile.columns);
    const double time = pieces(items, clusters) * (tile.columns * tile.column + ENDING_SM90);
    if (best == 0 || time < least) best = tile.columns, least = time;
  }
  return best;
}

}  // namespace nunchaku_py::cuda
