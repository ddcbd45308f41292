// Which tile for which problem: data, and functions that need no GPU.
#pragma once
#include <span>

#include "cuda/arguments.h"
#include "cuda/common/device.cuh"
#include "cuda/linear/tile.h"

namespace nunchaku_py::cuda {

using Large = Tile<128, 128, 64, 64, 2>;
using Medium = Tile<64, 128, 32, 64, 3>;
using Small = Tile<32, 128, 16, 64, 3>;
enum class Choice : int { large, medium, small };
inline constexpr Choice CHOICES[] = {Choice::large, Choice::medium, Choice::small};

struct TileCost {
  int rows, columns;
  double cell;  // time of an element of y against the large tile's; an estimate: what is loaded for each product
};

constexpr TileCost cost_of(Choice choice) {
  switch (choice) {
    case Choice::large:
      return {Large::BM, Large::BN, 1.0};
    case Choice::medium:
      return {Medium::BM, Medium::BN, 1.12};
    default:
      return {Small::BM, Small::BN, 1.45};
  }
}

constexpr int pieces(int size, int piece) {
  return (size + piece - 1) / piece;
}

// Of problems in one launch: the tile with which the multiprocessor that has most to do is done first; of equals the
// larger. sm_75 has no large one: what is on its way to shared memory is in registers there.
constexpr Choice choose(std::span<const Problem> problems, Gpu gpu) {
  Choice best = Choice::medium;
  double least = -1;
  for (const Choice choice : CHOICES) {
    if (choice == Choice::large && gpu.capability < 80) continue;
    const TileCost tile = cost_of(choice);
    int tiles = 0;
    for (const Problem& problem : problems) tiles += pieces(problem.m, tile.rows) * pieces(problem.n, tile.columns);
    const double time = pieces(tiles, gpu.multiprocessors) * tile.cell * tile.rows * tile.columns;
    if (least < 0 || time < least) best = choice, least = time;
  }
  return best;
}

// How many of `columns` neighbouring tiles a block goes over where it adds up a part of h, with so many rows of tiles:
// few parts, as each is written and read again, but no multiprocessor idle.
constexpr int tiles_of_block(int rows, int columns, int multiprocessors) {
  constexpr double PART = 0.1;  // time of a part against a tile's; an estimate
  int best = 1;
  double least = 0;
  for (int tiles = 1; tiles <= columns; ++tiles) {
    const double time = pieces(rows * pieces(columns, tiles), multiprocessors) * (tiles + PART);
    if (tiles == 1 || time < least) best = tiles, least = time;
  }
  return best;
}

}  // namespace nunchaku_py::cuda
