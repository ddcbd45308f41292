// The endings that quantize for the next linear, launched. Their input is signed: it follows no GELU.
#pragma once
#include "cuda/linear_w4a4/host.cuh"
#include "cuda/linear_w4a4/next_act.cuh"

namespace nunchaku_py::cuda {

constexpr int SUM_THREADS = 128;

// A block's share of the columns of tiles, and how many blocks share a row of tiles.
struct Shares {
  int tiles, parts;
};

template <class Z>
Shares shares_of(int device, int m, int width, int tile_rows) {
  const int columns = pieces(width, Z::WIDTH);
  const int tiles = tiles_of_block(pieces(m, tile_rows), columns, multiprocessors(device));
  return {tiles, pieces(columns, tiles)};
}

// Z: Plain<Tile> or Gated<Tile>
template <template <class> class Z>
int parts_of(int device, int m, int n, int width) {
  int parts = 0;
  with_tile(choose({m, n}, multiprocessors(device)),
            [&]<class Tile>(Tile) { parts = shares_of<Z<Tile>>(device, m, width, Tile::BM).parts; });
  return parts;
}

template <template <class> class Z, class T>
void launch_next(const LinearArguments& a, const NextArguments& to, int width, int jump, auto make) {
  const auto stream = static_cast<stream_t>(a.where.stream);
  const NextAct<T> next = {to.qx,    static_cast<T*>(to.sx), to.inv_smooth, static_cast<const T*>(to.down),
                           to.parts, to.shift,               a.m,           width,
                           to.r,     to.is_unsigned};
  int parts = 0;
  with_tile(choose({a.m, a.n}, multiprocessors(a.where.device)), [&]<class Tile>(Tile) {
    const Shares shares = shares_of<Z<Tile>>(a.where.device, a.m, width, Tile::BM);
    parts = shares.parts;
    const dim3 grid{unsigned(pieces(a.m, Tile::BM)), unsigned(parts)};
    launch(linear_w4a4_next_kernel<Tile, false, T, Z<Tile>>, grid, Tile::THREADS,
           shared_bytes<Tile>(sizeof(Hidden<Tile, T>)), stream, linear_of<T>(a, jump), next,
           make.template operator()<Z<Tile>>(), shares.tiles);
  });
  if (const int size = a.m * to.r)
    launch(sum_hidden_kernel<SUM_THREADS>, dim3{unsigned(pieces(size, SUM_THREADS))}, SUM_THREADS, 0, stream, to.parts,
           parts, to.h, size);
}

}  // namespace nunchaku_py::cuda
