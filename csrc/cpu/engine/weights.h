// Rows of 4-bit weights: what their codes stand for, folded to INT8 with one scale per row, or decoded to 16 or 32 bit.
#pragma once
#include "numbers.h"

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

constexpr int block = 64;  // codes that are expanded at a time: 32 bytes
// K in whole blocks, at least one.
constexpr std::int64_t padded_depth(std::int64_t k) { return round_up(k ? k : 1, block); }
constexpr int span = 16;   // and that share a table; groups are multiples of it

alignas(64) constexpr float int4_values[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
alignas(64) constexpr float uint4_values[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
alignas(64) constexpr float e2m1_values[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.0f, -.5, -1, -1.5, -2, -3, -4, -6};

inline const float* values_of(Format format) {
  return format == Format::int4 ? int4_values : format == Format::uint4 ? uint4_values : e2m1_values;
}

// A 4-bit matrix as the file holds it.
struct Codes {
  const std::uint8_t* codes;
  const void* scales;
  Format format;
  Type scale_type;
  std::int64_t k, group;
  Array aux;  // channel_scale or zeros

  explicit Codes(const LinearArguments& a)
      : codes(a.qw), scales(a.sw), format(a.weight), scale_type(a.weight_scales), k(a.k), group(a.group), aux(a.aux) {}

  std::int64_t row_bytes() const { return (k + 1) / 2; }
  std::int64_t groups() const { return group ? (k + group - 1) / group : 1; }
  const std::uint8_t* row(std::int64_t n) const { return codes + n * row_bytes(); }

  float scale(std::int64_t n, std::int64_t g) const {
    if (format == Format::nvfp4) return e4m3_values[static_cast<const std::uint8_t*>(scales)[n * groups() + g]];
    return number(scales, scale_type, n * groups() + g);
  }
  float zero(std::int64_t n, std::int64_t g) const { return number(aux.data, aux.type, n * groups() + g); }
  float channel(std::int64_t n) const { return format == Format::nvfp4 ? number(aux.data, aux.type, n) : 1.0f; }

  // What the sixteen codes stand for in group g of row n. The roundings are those of formats.decode.
  void table(float* out, std::int64_t n, std::int64_t g) const {
    const float* values = values_of(format);
    const F factor = Simd::set1(scale(n, g));
    const F offset = Simd::set1(format == Format::uint4 ? zero(n, g) : 0.0f), row_scale = Simd::set1(channel(n));
    for (int i = 0; i < 16; i += W) {
      F v = Simd::mul(Simd::load(values + i), factor);
      if (format == Format::uint4) v = Simd::add(v, offset);
      if (format == Format::nvfp4) v = Simd::mul(v, row_scale);
      Simd::store(out + i, v);
    }
  }

  // No weight of the group is larger. NaN where any could be NaN.
  float bound(std::int64_t n, std::int64_t g) const {
    const float s = scale(n, g);
    if (format == Format::int4) return 8 * std::fabs(s);
    if (format == Format::nvfp4) return std::fabs(6 * s * channel(n));
    const float low = zero(n, g), high = 15 * s + low;
    return std::fabs(low) > std::fabs(high) ? std::fabs(low) : std::fabs(high);
  }
};

// max|w| over codes [k0, k1) of one row.
inline float largest(const std::uint8_t* row, std::int64_t k0, std::int64_t k1, const float* table) {
  F top = Simd::zero();
  std::int64_t k = k0;
  for (; k + W <= k1; k += W) top = Simd::max(top, Simd::abs(Simd::lookup(table, Simd::load_nibbles(row + k / 2))));
  float result = Simd::reduce_max(top);
  for (; k < k1; k++) {
    const float w = std::fabs(table[row[k / 2] >> (k % 2 * 4) & 15]);
    result = result > w ? result : w;
  }
  return result;
}

// max|w| of a row, NaN if it may hold a number that is not finite. Only groups that could hold the largest are read.
inline float row_top(const Codes& w, std::int64_t n) {
  float top = 0, table[16];
  const std::int64_t group = w.group ? w.group : w.k;
  for (std::int64_t g = 0; g < w.groups(); g++) {
    const float bound = w.bound(n, g);
    if (!(bound <= largest_float)) return not_a_number;
    if (bound <= top) continue;
    w.table(table, n, g);
    const float found = largest(w.row(n), g * group, smaller((g + 1) * group, w.k), table);
    top = top > found ? top : found;
  }
  return top;
}

// One scale per row for INT8: max|w|/127, as formats.fold_int8.
inline float row_scale(const Codes& w, std::int64_t n) { return row_top(w, n) / 127; }

// The INT8 value of each code: round(w/s), sixteen for every group of row n.
inline void fold_tables(const Codes& w, std::int64_t n, float s, std::int8_t* tables) {
  const bool usable = s > 0;  // else zero, or NaN
  const F divisor = Simd::set1(usable ? s : 1.0f);
  for (std::int64_t g = 0; g < w.groups(); g++) {
    alignas(64) float table[16];
    w.table(table, n, g);
    for (int i = 0; i < 16; i += W)
      Simd::store_int8(tables + 16 * g + i, Simd::to_int(Simd::div(Simd::load(table + i), divisor)));
  }
  if (!usable) std::memset(tables, 0, static_cast<std::size_t>(16 * w.groups()));
}

// The tables of the block that begins at code k, where groups are shorter than a block.
inline Simd::Tables short_tables(const std::int8_t* tables, std::int64_t groups, std::int64_t group, std::int64_t k) {
  std::int8_t four[64];
  for (std::int64_t i = 0; i < 4; i++)
    std::memcpy(four + 16 * i, tables + 16 * smaller((k + span * i) / group, groups - 1), 16);
  return Simd::load_tables(four);
}

// `k` nibbles through the tables of their groups to int8. Up to the next whole block, what is written means nothing.
inline void expand(std::int8_t* out, const std::uint8_t* row, std::int64_t k, const std::int8_t* tables,
                   std::int64_t group) {
  const std::int64_t groups = (k + group - 1) / group, whole = k / block * block;
  std::int64_t at = 0;
  if (group % block == 0) {
    for (std::int64_t g = 0; g < groups; g++) {
      const Simd::Tables repeated = Simd::repeat_table(tables + 16 * g);
      for (; at < smaller((g + 1) * group, whole); at += block) Simd::lookup_bytes(out + at, row + at / 2, repeated);
    }
  } else if (group == span) {
    for (; at < whole; at += block) Simd::lookup_bytes(out + at, row + at / 2, Simd::load_tables(tables + at));
  } else {
    for (; at < whole; at += block)
      Simd::lookup_bytes(out + at, row + at / 2, short_tables(tables, groups, group, at));
  }
  if (at == k) return;
  std::uint8_t rest[block / 2] = {};
  std::memcpy(rest, row + at / 2, static_cast<std::size_t>((k - at + 1) / 2));
  Simd::lookup_bytes(out + at, rest, short_tables(tables, groups, group, at));
}

// The integer that each code stands for, twice that for nvfp4.
struct IntegerTable {
  std::int8_t bytes[16];

  explicit IntegerTable(Format format) {
    for (int i = 0; i < 16; i++)
      bytes[i] = static_cast<std::int8_t>(values_of(format)[i] * (format == Format::nvfp4 ? 2 : 1));
  }
};

inline void widen(std::int16_t* out, const std::int8_t* bytes, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i++) out[i] = bytes[i];
}

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
