// Rows of 4-bit weights: what their codes stand for, folded to INT8 with one scale per row, or decoded to 16 or 32 bit.
#pragma once
#include "numbers.h"

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

constexpr int block = 64;  // codes that are expanded at a time: 32 bytes
// K in whole blocks, at least one.
constexpr std::int64_t padded_depth(std::int64_t k) {
  return round_up(k ? k : 1, block);
}
constexpr int span = 16;  // and that share a table; groups are multiples of it

alignas(64) constexpr float int4_values[16] = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
alignas(64) constexpr float uint4_values[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
alignas(64) constexpr float e2m1_values[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.0f, -.5, -1, -1.5, -2, -3, -4, -6};
alignas(64) constexpr float e2m1_sizes[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, 0, .5, 1, 1.5, 2, 3, 4, 6};

inline const float* values_of(Format format) {
  return format == Format::int4 ? int4_values : format == Format::uint4 ? uint4_values : e2m1_values;
}

// Sixteen numbers, one for each code.
struct Sixteen {
  F part[16 / W];

  void store(float* out) const {
    for (int i = 0; i < 16 / W; i++) Simd::store(out + i * W, part[i]);
  }
  Simd::Table held() const {
    alignas(64) float out[16];
    store(out);
    return Simd::table(out);
  }
  Sixteen rounded_to(Type type) const {
    Sixteen out;
    for (int i = 0; i < 16 / W; i++) out.part[i] = round_to(type, part[i]);
    return out;
  }
};

// A 4-bit matrix as the file holds it.
struct Codes {
  const std::uint8_t* codes;
  const void* scales;
  Format format;
  Type scale_type;
  std::int64_t k, group, groups, row_bytes;  // group: the row where it has one scale
  Array aux;                                 // channel_scale or zeros

  explicit Codes(const LinearArguments& a)
      : codes(a.qw),
        scales(a.sw),
        format(a.weight),
        scale_type(a.weight_scales),
        k(a.k),
        group(a.group ? a.group : padded_depth(a.k)),
        groups(a.group ? (a.k + a.group - 1) / a.group : 1),
        row_bytes((a.k + 1) / 2),
        aux(a.aux) {}

  const std::uint8_t* row(std::int64_t n) const { return codes + n * row_bytes; }

  float scale(std::int64_t n, std::int64_t g) const {
    if (format == Format::nvfp4) return e4m3_values[static_cast<const std::uint8_t*>(scales)[n * groups + g]];
    return number(scales, scale_type, n * groups + g);
  }
  // All scales of a row, and behind them its zeros if it has any; room for two times groups, rounded up to W.
  void row_scales(std::int64_t n, float* out) const {
    const std::int64_t padded = round_up(groups, W);
    if (format != Format::nvfp4) to_floats(out, at(scales, scale_type, n * groups), scale_type, groups, padded);
    for (std::int64_t g = 0; format == Format::nvfp4 && g < groups; g++) out[g] = scale(n, g);
    if (format == Format::uint4) to_floats(out + padded, at(aux.data, aux.type, n * groups), aux.type, groups, padded);
  }
  float zero(std::int64_t n, std::int64_t g) const { return number(aux.data, aux.type, n * groups + g); }
  float channel(std::int64_t n) const { return format == Format::nvfp4 ? number(aux.data, aux.type, n) : 1.0f; }

  // What the sixteen codes stand for in a group. The roundings are those of formats.decode. It calls nothing: a call
  // would push the sums that its callers keep in registers out to memory.
  Sixteen table(float scale_of_group, float zero_of_group, float channel_of_row) const {
    const float* values = values_of(format);
    const F factor = Simd::set1(scale_of_group);
    Sixteen out;
    for (int i = 0; i < 16 / W; i++) {
      F v = Simd::mul(Simd::load(values + i * W), factor);
      if (format == Format::uint4) v = Simd::add(v, Simd::set1(zero_of_group));
      if (format == Format::nvfp4) v = Simd::mul(v, Simd::set1(channel_of_row));
      out.part[i] = v;
    }
    return out;
  }
  Sixteen table(std::int64_t n, std::int64_t g) const {
    return table(scale(n, g), format == Format::uint4 ? zero(n, g) : 0.0f, channel(n));
  }

  // No weight of the group is larger. Infinite or NaN where one may be.
  float bound(std::int64_t n, std::int64_t g) const {
    const float s = scale(n, g);
    if (format == Format::int4) return 8 * std::fabs(s);
    if (format == Format::nvfp4) return std::fabs(6 * s * channel(n));
    const float low = zero(n, g), high = 15 * s + low;
    return std::fabs(low) > std::fabs(high) ? std::fabs(low) : std::fabs(high);
  }
};

// max|w| over codes [k0, k1) of one row.
inline float largest(const std::uint8_t* row, std::int64_t k0, std::int64_t k1, const Sixteen& table) {
  F top = Simd::zero();
  std::int64_t k = k0;
  const Simd::Table held = table.held();
  for (; k + W <= k1; k += W) top = Simd::max(top, Simd::abs(Simd::lookup(held, Simd::load_nibbles(row + k / 2))));
  float result = Simd::reduce_max(top), values[16];
  if (k < k1) table.store(values);
  for (; k < k1; k++) {
    const float w = std::fabs(values[row[k / 2] >> (k % 2 * 4) & 15]);
    result = result > w ? result : w;
  }
  return result;
}

// max|w| over codes [k0, k1) of one row, NaN if one is not finite.
inline float largest_checked(const std::uint8_t* row, std::int64_t k0, std::int64_t k1, const Sixteen& table) {
  float result = 0, values[16];
  table.store(values);
  for (std::int64_t k = k0; k < k1; k++) {
    const float w = std::fabs(values[row[k / 2] >> (k % 2 * 4) & 15]);
    if (!(w <= largest_float)) return not_a_number;
    result = result > w ? result : w;
  }
  return result;
}

// max|w| of a row, NaN if one is not finite. Only groups that could hold the largest are read.
inline float row_top(const Codes& w, std::int64_t n) {
  float top = 0;
  for (std::int64_t g = 0; g < w.groups; g++) {
    const float bound = w.bound(n, g);
    if (bound <= top) continue;
    const auto search = bound <= largest_float ? largest : largest_checked;
    const float found = search(w.row(n), g * w.group, smaller((g + 1) * w.group, w.k), w.table(n, g));
    if (found != found) return not_a_number;
    top = top > found ? top : found;
  }
  return top;
}

// The INT8 value of each code: round(w/s), sixteen for every group of row n. A subnormal s may be so far below
// max|w|/127 that values have to be clamped. scales: room for those of the row.
inline void fold_tables(const Codes& w, std::int64_t n, float s, float* scales, std::int8_t* tables) {
  const bool usable = s > 0;  // else zero, or NaN
  const F divisor = Simd::set1(usable ? s : 1.0f), low = Simd::set1(-127), high = Simd::set1(127);
  const std::int64_t groups = w.groups, zeros = w.format == Format::uint4 ? round_up(groups, W) : 0;
  const float channel = w.channel(n);
  w.row_scales(n, scales);
  for (std::int64_t g = 0; g < groups; g++) {
    const Sixteen values = w.table(scales[g], scales[zeros + g], channel);
    for (int i = 0; i < 16 / W; i++) {
      const F v = Simd::min(Simd::max(Simd::div(values.part[i], divisor), low), high);
      Simd::store_int8(tables + 16 * g + i * W, Simd::to_int(v));
    }
  }
  if (!usable) std::memset(tables, 0, static_cast<std::size_t>(16 * groups));
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
    for (; at < whole; at += block) Simd::lookup_bytes(out + at, row + at / 2, short_tables(tables, groups, group, at));
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
