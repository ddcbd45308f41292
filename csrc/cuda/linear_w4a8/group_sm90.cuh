// Linears in one launch on Hopper: their tiles are one sequence, of which clusters take every so-manieth.
#pragma once
#include "cuda/common/cluster.cuh"
#include "cuda/common/tma.cuh"
#include "cuda/linear/group.cuh"
#include "cuda/linear_w4a8/tile_sm90.h"

namespace nunchaku_py::cuda {

template <class T, class Ending>
struct PartSm90 : Part<T, Ending> {
  TensorMap x, w, up;  // (M, K), (N, K) and (N, 2·R) bytes, in boxes of BM and of BN/2 rows
  int first, rows;     // its first item; pairs of tiles one below the other, which two blocks take
};

// Kernels have it as const __grid_constant__: TMA reads the maps where they are.
template <class T, class Ending>
struct GroupSm90 {
  PartSm90<T, Ending> parts[PARTS];
  int items = 0, count = 0;  // of all parts; parts
};

// What a cluster does at a time: BN channels for two tiles of rows.
struct Item {
  int part, m0, n0;  // m0: of this block's tile
};

// Items below each other come one after another: clusters that run at a time share columns of the weight.
template <class Tile, int WIDTH, class T, class Ending>
DEVICE Item item_of(const GroupSm90<T, Ending>& group, int i) {
  int part = 0;
  while (part + 1 < group.count && i >= group.parts[part + 1].first) ++part;
  const int of_part = i - group.parts[part].first, rows = group.parts[part].rows;
  return {part, (of_part % rows * Tile::CLUSTER + cluster_rank()) * Tile::BM, of_part / rows * WIDTH};
}

}  // namespace nunchaku_py::cuda
