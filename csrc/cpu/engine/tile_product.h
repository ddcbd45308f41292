// The product of product.h in AMX tiles: 16 rows by 16 columns, 64 bytes of K at a time, two by two of them together.
#pragma once
#include "simd.h"

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

// Rows are taken by 16: A and C have room for whole tiles. depth is a multiple of 16 words.
template <class Dot, int down, int across>
inline void tile_block(const std::int32_t* a, std::int64_t a_stride, const std::int32_t* b, std::int64_t depth,
                       typename Dot::Scalar* c, std::int64_t c_stride, bool add) {
  if (add) {
    Tiles::load<0>(c, 4 * c_stride);
    if constexpr (across > 1) Tiles::load<1>(c + 16, 4 * c_stride);
    if constexpr (down > 1) Tiles::load<2>(c + 16 * c_stride, 4 * c_stride);
    if constexpr (down > 1 && across > 1) Tiles::load<3>(c + 16 * c_stride + 16, 4 * c_stride);
  } else {
    Tiles::zero<0>(), Tiles::zero<1>(), Tiles::zero<2>(), Tiles::zero<3>();
  }
  for (std::int64_t d = 0; d < depth; d += 16) {
    Tiles::load<4>(a + d, 4 * a_stride);
    Tiles::load<6>(b + d * 16, 64);
    Dot::template dot<0, 4, 6>();
    if constexpr (down > 1) {
      Tiles::load<5>(a + 16 * a_stride + d, 4 * a_stride);
      Dot::template dot<2, 5, 6>();
    }
    if constexpr (across > 1) {
      Tiles::load<7>(b + (depth + d) * 16, 64);
      Dot::template dot<1, 4, 7>();
    }
    if constexpr (down > 1 && across > 1) Dot::template dot<3, 5, 7>();
  }
  Tiles::store<0>(c, 4 * c_stride);
  if constexpr (across > 1) Tiles::store<1>(c + 16, 4 * c_stride);
  if constexpr (down > 1) Tiles::store<2>(c + 16 * c_stride, 4 * c_stride);
  if constexpr (down > 1 && across > 1) Tiles::store<3>(c + 16 * c_stride + 16, 4 * c_stride);
}

template <class Dot, int across>
inline void tile_strip(const std::int32_t* a, std::int64_t a_stride, std::int64_t rows, const std::int32_t* b,
                       std::int64_t depth, typename Dot::Scalar* c, std::int64_t c_stride, bool add) {
  std::int64_t i = 0;
  for (; i + 16 < rows; i += 32)
    tile_block<Dot, 2, across>(a + i * a_stride, a_stride, b, depth, c + i * c_stride, c_stride, add);
  if (i < rows) tile_block<Dot, 1, across>(a + i * a_stride, a_stride, b, depth, c + i * c_stride, c_stride, add);
}

template <class Dot>
void tile_product(const std::int32_t* a, std::int64_t a_stride, std::int64_t rows, const std::int32_t* b,
                  std::int64_t vectors, std::int64_t depth, typename Dot::Scalar* c, std::int64_t c_stride, bool add) {
  std::int64_t j = 0;
  for (; j + 2 <= vectors; j += 2)
    tile_strip<Dot, 2>(a, a_stride, rows, b + j * depth * 16, depth, c + j * 16, c_stride, add);
  if (j < vectors) tile_strip<Dot, 1>(a, a_stride, rows, b + j * depth * 16, depth, c + j * 16, c_stride, add);
}

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
