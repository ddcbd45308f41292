// Linears in one launch, of which none needs the others: their rows of tiles stand one after another.
#pragma once
#include <climits>

#include "cuda/linear/low_rank.cuh"

namespace nunchaku_py::cuda {

template <class T>
struct Linear {
  Operands in;
  LowRank<T> branch;
  const float* bias;  // (N)
};

constexpr int PARTS = 6;  // q, k, v of two streams

template <class T, class Ending>
struct Part {
  Linear<T> linear;
  Ending ending;
};

template <class T, class Ending>
struct Group {
  Part<T, Ending> parts[PARTS];
  // Of a part's rows of tiles in the launch's; of parts that are not there, beyond the last.
  int first[PARTS] = {0, INT_MAX, INT_MAX, INT_MAX, INT_MAX, INT_MAX};
};

// Which part a block works for, and the first of its rows there. Found anew where it is wanted, as Place is.
struct Turn {
  int part, m0;
};

template <class Tile, class T, class Ending>
DEVICE Turn turn_of_block(const Group<T, Ending>& group) {
  const int block = this_block();
  int part = 0;
#pragma unroll
  for (int i = 1; i < PARTS; ++i) part += block >= group.first[i];
  return {part, (block - group.first[part]) * Tile::BM};
}

}  // namespace nunchaku_py::cuda
