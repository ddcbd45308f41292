// C (rows, columns) += A·B, the one inner loop of every op here. A is held by rows, B by columns, both in 32-bit words
// of one fp32, two bf16, two int16 or four int8 along K:
//
//   A[row·a_stride + d]                   one word is broadcast
//   B[(column / W·depth + d)·W + column % W]   W columns are a vector: "columns" below are packed so
//   C[row·c_stride + column]
//
// Weights are rows and tokens are columns, so that 4-bit weights are expanded as they lie in the file.
#pragma once
#include "simd.h"
#if defined(NUNCHAKU_PY_AMX)
#include "tile_product.h"
#else
namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {
struct TileScope {};
}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
#endif

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

constexpr int W = Simd::W;
using F = Simd::F;
using I = Simd::I;

constexpr std::int64_t round_up(std::int64_t value, std::int64_t step) {
  return (value + step - 1) / step * step;
}
constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}

struct Integers {
  static constexpr bool in_tiles = false;
  static constexpr std::int32_t column_offset = 0;
  using Vector = I;
  using Scalar = std::int32_t;
  static I zero() { return Simd::zero_int(); }
  static I load(const std::int32_t* p) { return Simd::load_int(p); }
  static void store(std::int32_t* p, I a) { Simd::store_int(p, a); }
};

struct Floats {
  static constexpr bool in_tiles = false;
  using Vector = F;
  using Scalar = float;
  static F zero() { return Simd::zero(); }
  static F load(const float* p) { return Simd::load(p); }
  static void store(float* p, F a) { Simd::store(p, a); }
};

struct DotFloat : Floats {
  static constexpr int per_word = 1;
  static F dot(F acc, I b, std::int32_t a) {
    return Simd::fma(Simd::as_float(b), Simd::set1(std::bit_cast<float>(a)), acc);
  }
};

struct DotInt16 : Integers {
  static constexpr int per_word = 2;
  static I dot(I acc, I b, std::int32_t a) { return Simd::dot_int16(acc, b, a); }
};

#if defined(NUNCHAKU_PY_AMX)
struct DotInt8 : Integers {
  static constexpr int per_word = 4;
  static constexpr bool in_tiles = true;
  template <int c, int a, int b>
  static void dot() {
    Tiles::dot_int8<c, a, b>();
  }
};
#elif defined(NUNCHAKU_PY_AVX_VNNI) || defined(NUNCHAKU_PY_AVX512)
struct DotInt8 : Integers {  // columns are unsigned, 128 too large: what that adds is taken off afterwards
  static constexpr int per_word = 4;
  static constexpr std::int32_t column_offset = 128;
  static I dot(I acc, I b, std::int32_t a) { return Simd::dot_uint8(acc, b, a); }
};
#else
using DotInt8 = DotInt16;
#endif

#if defined(NUNCHAKU_PY_AMX)
struct DotBf16 : Floats {
  static constexpr int per_word = 2;
  static constexpr bool in_tiles = true;
  template <int c, int a, int b>
  static void dot() {
    Tiles::dot_bf16<c, a, b>();
  }
};
#elif defined(NUNCHAKU_PY_AVX512_BF16)
struct DotBf16 : Floats {
  static constexpr int per_word = 2;
  static F dot(F acc, I b, std::int32_t a) { return Simd::dot_bf16(acc, b, a); }
};
#else
using DotBf16 = DotFloat;  // bf16 is widened
#endif

// Registers: rows·vectors accumulators, the vectors of B, one broadcast of A (and one more product without VNNI).
constexpr int tile_rows = W == 16 ? 8 : 6;
#if defined(NUNCHAKU_PY_AMX)
constexpr int tile_vectors = 4;
#else
constexpr int tile_vectors = W == 16 ? 3 : 2;
#endif

template <class Dot, int rows, int vectors>
inline void tile(const std::int32_t* a, std::int64_t a_stride, const std::int32_t* b, std::int64_t depth,
                 typename Dot::Scalar* c, std::int64_t c_stride, bool add) {
  typename Dot::Vector acc[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) acc[i][j] = add ? Dot::load(c + i * c_stride + j * W) : Dot::zero();
  for (std::int64_t d = 0; d < depth; d++) {
    I column[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) column[j] = Simd::load_int(b + (j * depth + d) * W);
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++) {
      const std::int32_t word = a[i * a_stride + d];
#pragma GCC unroll 4
      for (int j = 0; j < vectors; j++) acc[i][j] = Dot::dot(acc[i][j], column[j], word);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; j++) Dot::store(c + i * c_stride + j * W, acc[i][j]);
}

template <class Dot, int vectors>
inline void tile_column(const std::int32_t* a, std::int64_t a_stride, std::int64_t rows, const std::int32_t* b,
                        std::int64_t depth, typename Dot::Scalar* c, std::int64_t c_stride, bool add) {
  std::int64_t i = 0;
  for (; i + tile_rows <= rows; i += tile_rows)
    tile<Dot, tile_rows, vectors>(a + i * a_stride, a_stride, b, depth, c + i * c_stride, c_stride, add);
  for (; i + 4 <= rows; i += 4)
    tile<Dot, 4, vectors>(a + i * a_stride, a_stride, b, depth, c + i * c_stride, c_stride, add);
  for (; i < rows; i++) tile<Dot, 1, vectors>(a + i * a_stride, a_stride, b, depth, c + i * c_stride, c_stride, add);
}

template <class Dot>
void vector_product(const std::int32_t* a, std::int64_t a_stride, std::int64_t rows, const std::int32_t* b,
                    std::int64_t vectors, std::int64_t depth, typename Dot::Scalar* c, std::int64_t c_stride,
                    bool add) {
  constexpr int most = tile_vectors > 3 ? 3 : tile_vectors;
  std::int64_t j = 0;
  for (; j + most <= vectors; j += most)
    tile_column<Dot, most>(a, a_stride, rows, b + j * depth * W, depth, c + j * W, c_stride, add);
  if constexpr (most > 2)
    for (; j + 2 <= vectors; j += 2)
      tile_column<Dot, 2>(a, a_stride, rows, b + j * depth * W, depth, c + j * W, c_stride, add);
  for (; j < vectors; j++) tile_column<Dot, 1>(a, a_stride, rows, b + j * depth * W, depth, c + j * W, c_stride, add);
}

// `vectors` vectors of columns; C is added to, or written. In tiles, rows of A and C up to the next 16 are touched too.
template <class Dot>
void product(const std::int32_t* a, std::int64_t a_stride, std::int64_t rows, const std::int32_t* b,
             std::int64_t vectors, std::int64_t depth, typename Dot::Scalar* c, std::int64_t c_stride, bool add) {
#if defined(NUNCHAKU_PY_AMX)
  if constexpr (Dot::in_tiles) return tile_product<Dot>(a, a_stride, rows, b, vectors, depth, c, c_stride, add);
#endif
  if constexpr (!Dot::in_tiles) vector_product<Dot>(a, a_stride, rows, b, vectors, depth, c, c_stride, add);
}

// W rows of words (each `stride` words after the other, depth a multiple of W) as one vector of packed columns.
inline void pack_columns(std::int32_t* out, const std::int32_t* rows, std::int64_t stride, std::int64_t depth) {
  for (std::int64_t d = 0; d < depth; d += W) Simd::transpose(out + d * W, W, rows + d, stride);
}

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
