// Three ways to accumulate: W4A8, W4A4, W4A16. Each says how it packs tokens, how it expands a panel of weights, and
// how a piece of C in fp32 comes of both.
#pragma once
#include "../scratch.h"
#include "finish.h"
#include "fold.h"

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

// Rows of a panel start a cache line apart from a multiple of 4096 bytes, or they would share sets of the cache.
template <class Dot>
constexpr std::int64_t depth_of(std::int64_t k) {
  return padded_depth(k) / Dot::per_word;
}
constexpr std::int64_t row_padding = 16;  // words

// Signed bytes as DotInt8's columns; zeros up to `padded`.
inline void stage_bytes(std::int32_t* out, const std::int8_t* bytes, std::int64_t k, std::int64_t padded) {
  if constexpr (DotInt8::per_word == 2) {
    auto* place = reinterpret_cast<std::int16_t*>(out);
    widen(place, bytes, k);
    std::memset(place + k, 0, static_cast<std::size_t>(padded - k) * 2);
  } else {
    auto* place = reinterpret_cast<std::uint8_t*>(out);
    constexpr auto offset = static_cast<std::uint8_t>(DotInt8::column_offset);
    for (std::int64_t i = 0; i < k; i++) place[i] = static_cast<std::uint8_t>(bytes[i] + offset);
    std::memset(place + k, offset, static_cast<std::size_t>(padded - k));
  }
}

// Scales of a panel and its integers, in the order of one thread's scratch memory.
struct Pieces {
  std::int32_t* weights;   // (rows, stride) words
  float* scales;           // per row; W4A4: (rows, groups)
  std::int32_t* sums;      // per row: what the columns' offset adds
  float* channels;         // per row: W4A4's channel_scale
  float* offsets;          // W4A4 with uint4 weights: zeros (rows, groups)
  std::int8_t* bytes;      // one row, expanded
  float* row_scales;       // of one row
  std::int8_t* tables;     // of one row, 16 per group
  std::int32_t* integers;  // W4A4's sums of one group: (rows, token_step)
};

struct W4A8 {
  using Dot = DotInt8;
  const LinearArguments& a;
  Codes w;
  std::int64_t depth, stride, padded;

  explicit W4A8(const LinearArguments& arguments)
      : a(arguments), w(arguments), depth(depth_of<Dot>(a.k)), stride(depth + row_padding), padded(padded_depth(a.k)) {}

  std::int64_t scale_count(std::int64_t rows) const { return rows; }

  void stage(std::int32_t* out, float*, std::int64_t m) const {
    stage_bytes(out, static_cast<const std::int8_t*>(a.qx) + m * a.k, a.k, padded);
  }
  std::int64_t token_scales() const { return 1; }
  void stage_scales(float* out, std::int64_t m, std::int64_t) const { *out = static_cast<const float*>(a.sx)[m]; }

  void expand_row(const Pieces& to, std::int64_t i, std::int64_t n) const {
    auto* row = reinterpret_cast<std::int8_t*>(to.weights + i * stride);
    std::int8_t* bytes = Dot::per_word == 4 ? row : to.bytes;
    if (a.weight == Format::int8) {
      copy(bytes, a.qw + n * a.k, a.k);
      std::memset(bytes + a.k, 0, static_cast<std::size_t>(padded - a.k));
      to.scales[i] = static_cast<const float*>(a.sw)[n];
    } else {
      to.scales[i] = a.row_scales ? a.row_scales[n] : row_scale(w, n);
      fold_tables(w, n, to.scales[i], to.row_scales, to.tables);
      expand(bytes, w.row(n), a.k, to.tables, w.group);
    }
    to.sums[i] = 0;
    if constexpr (Dot::column_offset != 0) {
      I sum = Simd::zero_int();
      for (std::int64_t k = 0; k < padded; k += block) sum = Simd::add_bytes(sum, bytes + k);
      to.sums[i] = Dot::column_offset * Simd::reduce_add_int(sum);
    }
    if constexpr (Dot::per_word == 2) widen(reinterpret_cast<std::int16_t*>(row), bytes, padded);
  }

  void multiply(const Pieces& p, std::int64_t rows, const std::int32_t* columns, const float* sx, std::int64_t vectors,
                float* c) const {
    auto* sums = reinterpret_cast<std::int32_t*>(c);  // in place: what is worked on stays in the first-level cache
    product<Dot>(p.weights, stride, rows, columns, vectors, depth, sums, token_step, false);
    for (std::int64_t i = 0; i < rows; i++)
      for (std::int64_t j = 0; j < vectors; j++) {
        const I sum = Simd::sub_int(Simd::load_int(sums + i * token_step + j * W), Simd::set1_int(p.sums[i]));
        const F scaled = Simd::mul(Simd::to_float(sum), Simd::load(sx + j * W));
        Simd::store(c + i * token_step + j * W, Simd::mul(scaled, Simd::set1(p.scales[i])));
      }
  }
};

// Group by group, each sum of integers exact; for parity with what GPUs compute, not for speed.
struct W4A4 {
  using Dot = DotInt16;
  const LinearArguments& a;
  Codes w;
  std::int64_t depth, stride, padded, groups, group;
  IntegerTable act_values, weight_values;
  float unit;  // nvfp4 codes count halves

  explicit W4A4(const LinearArguments& arguments)
      : a(arguments),
        w(arguments),
        depth(depth_of<Dot>(a.k)),
        stride(depth + row_padding),
        padded(padded_depth(a.k)),
        groups(w.groups),
        group(w.group),
        act_values(a.act),
        weight_values(a.weight),
        unit((a.act == Format::nvfp4 ? 0.5f : 1.0f) * (a.weight == Format::nvfp4 ? 0.5f : 1.0f)) {}

  std::int64_t scale_count(std::int64_t rows) const { return rows * groups; }

  void stage(std::int32_t* out, float* bytes, std::int64_t m) const {
    auto* expanded = reinterpret_cast<std::int8_t*>(bytes);
    expand(expanded, static_cast<const std::uint8_t*>(a.qx) + m * w.row_bytes, a.k, act_values.bytes, padded);
    std::memset(expanded + a.k, 0, static_cast<std::size_t>(padded - a.k));
    widen(reinterpret_cast<std::int16_t*>(out), expanded, padded);
  }
  // Scales of a token's groups; with uint4 weights the sums of its groups' codes behind them.
  std::int64_t token_scales() const { return a.weight == Format::uint4 ? 2 * groups : groups; }
  void stage_scales(float* out, std::int64_t m, std::int64_t step) const {
    const auto* row = static_cast<const std::uint8_t*>(a.qx) + m * w.row_bytes;
    for (std::int64_t g = 0; g < groups; g++) {
      const std::int64_t at = m * groups + g;
      const float s = a.act == Format::nvfp4 ? e4m3_values[static_cast<const std::uint8_t*>(a.sx)[at]]
                                             : number(a.sx, a.act_scales, at);
      out[g * step] = s;
      if (a.weight != Format::uint4) continue;
      float sum = 0;
      for (std::int64_t k = g * group; k < smaller((g + 1) * group, a.k); k++)
        sum += values_of(a.act)[row[k / 2] >> (k % 2 * 4) & 15];
      out[(groups + g) * step] = s * sum;
    }
  }

  void expand_row(const Pieces& to, std::int64_t i, std::int64_t n) const {
    expand(to.bytes, w.row(n), a.k, weight_values.bytes, padded);
    widen(reinterpret_cast<std::int16_t*>(to.weights + i * stride), to.bytes, padded);
    for (std::int64_t g = 0; g < groups; g++) {
      to.scales[i * groups + g] = w.scale(n, g);
      if (a.weight == Format::uint4) to.offsets[i * groups + g] = w.zero(n, g);
    }
    to.channels[i] = w.channel(n);
  }

  void multiply(const Pieces& p, std::int64_t rows, const std::int32_t* columns, const float* sx, std::int64_t vectors,
                float* c) const {
    for (std::int64_t j = 0; j < vectors; j++) multiply_vector(p, rows, columns + j * depth * W, sx + j * W, c + j * W);
  }

  void multiply_vector(const Pieces& p, std::int64_t rows, const std::int32_t* columns, const float* sx,
                       float* c) const {
    for (std::int64_t i = 0; i < rows; i++) Simd::store(c + i * token_step, Simd::zero());
    for (std::int64_t g = 0; g < groups; g++) {
      const std::int64_t first = g * group / 2, words = smaller(group / 2, depth - first);
      product<Dot>(p.weights + first, stride, rows, columns + first * W, 1, words, p.integers, token_step, false);
      const F token = Simd::load(sx + g * token_step),
              sum = Simd::load(sx + (token_scales() - groups + g) * token_step);
      for (std::int64_t i = 0; i < rows; i++) {
        const F integer = Simd::to_float(Simd::load_int(p.integers + i * token_step));
        F acc = Simd::fma(Simd::mul(integer, Simd::set1(unit * p.scales[i * groups + g])), token,
                          Simd::load(c + i * token_step));
        if (a.weight == Format::uint4) acc = Simd::fma(Simd::set1(p.offsets[i * groups + g]), sum, acc);
        Simd::store(c + i * token_step, acc);
      }
    }
    for (std::int64_t i = 0; i < rows; i++)
      Simd::store(c + i * token_step, Simd::mul(Simd::load(c + i * token_step), Simd::set1(p.channels[i])));
  }
};

// Weights decoded to the type of the activation, products summed in fp32.
template <class DotOf>
struct W4A16 {
  using Dot = DotOf;
  const LinearArguments& a;
  Codes w;
  std::int64_t depth, stride, padded;

  explicit W4A16(const LinearArguments& arguments)
      : a(arguments), w(arguments), depth(depth_of<Dot>(a.k)), stride(depth + row_padding), padded(padded_depth(a.k)) {}

  std::int64_t scale_count(std::int64_t) const { return 0; }
  std::int64_t token_scales() const { return 0; }
  void stage_scales(float*, std::int64_t, std::int64_t) const {}

  void stage(std::int32_t* out, float*, std::int64_t m) const {
    const void* row = at(a.qx, a.x, m * a.k);
    if constexpr (Dot::per_word == 1) {
      to_floats(reinterpret_cast<float*>(out), row, a.x, a.k, padded);
    } else {
      copy(out, row, 2 * a.k);
      std::memset(reinterpret_cast<std::uint16_t*>(out) + a.k, 0, static_cast<std::size_t>(2 * (padded - a.k)));
    }
  }

  void expand_row(const Pieces& to, std::int64_t i, std::int64_t n) const {
    void* row = to.weights + i * stride;
    constexpr Type kind = Dot::per_word == 1 ? Type::f32 : Type::bf16;
    const std::int64_t group = w.group;
    for (std::int64_t g = 0; a.weight != Format::int8 && g < w.groups; g++) {
      const Simd::Table table = w.table(n, g).rounded_to(a.x).held();
      const std::int64_t end = smaller((g + 1) * group, a.k);
      std::int64_t k = g * group;
      for (; k + W <= end; k += W)
        store_as(at(row, kind, k), kind, Simd::lookup(table, Simd::load_nibbles(w.row(n) + k / 2)));
      if (k < end) {
        std::uint8_t rest[W / 2] = {};
        std::memcpy(rest, w.row(n) + k / 2, static_cast<std::size_t>((end - k + 1) / 2));
        store_as(at(row, kind, k), kind, Simd::lookup(table, Simd::load_nibbles(rest)));
      }
    }
    if (a.weight == Format::int8) expand_int8(row, kind, n);
    std::memset(at(row, kind, a.k), 0, static_cast<std::size_t>((padded - a.k) * size_of(kind)));
  }

  void expand_int8(void* row, Type kind, std::int64_t n) const {
    const auto* bytes = reinterpret_cast<const std::int8_t*>(a.qw) + n * a.k;
    const F scale = Simd::set1(static_cast<const float*>(a.sw)[n]);
    for (std::int64_t k = 0; k < a.k; k += W) {
      std::int8_t some[W] = {};
      std::memcpy(some, bytes + k, static_cast<std::size_t>(smaller(W, a.k - k)));
      store_as(at(row, kind, k), kind, round_to(a.x, Simd::mul(Simd::to_float(Simd::load_int8(some)), scale)));
    }
  }

  void multiply(const Pieces& p, std::int64_t rows, const std::int32_t* columns, const float*, std::int64_t vectors,
                float* c) const {
    product<Dot>(p.weights, stride, rows, columns, vectors, depth, c, token_step, false);
  }
};

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
