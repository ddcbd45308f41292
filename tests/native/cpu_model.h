// The CPU ops once more, one number at a time and as the formulas say, to hold the engines against. Nothing here is
// shared with csrc/cpu but the structs that the ops are called with.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/arguments.h"

namespace model {

using namespace nunchaku_py::cpu;

// ------------------------------------------------------------------------------------------------- memory and numbers
// Heap memory of exactly `bytes`, none of it for zero bytes, as torch gives it.
class Block {
 public:
  explicit Block(std::size_t bytes) : size(bytes), data_(bytes ? std::malloc(bytes) : nullptr) {}
  Block(Block&& other) noexcept : size(other.size), data_(other.data_) { other.data_ = nullptr; }
  Block& operator=(Block&&) = delete;
  ~Block() { std::free(data_); }

  template <class T>
  T* as() const { return static_cast<T*>(data_); }

  std::size_t size;

 private:
  void* data_;
};

struct Kind {
  int exponent_bits, mantissa_bits;
  bool infinities;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int bytes() const { return (1 + exponent_bits + mantissa_bits) / 8; }
};

constexpr Kind e4m3{4, 3, false};

inline Kind kind_of(Type type) {
  return type == Type::f32 ? Kind{8, 23, true} : type == Type::bf16 ? Kind{8, 7, true} : Kind{5, 10, true};
}

inline double decode(Kind kind, std::uint32_t bits) {
  const std::uint32_t mantissa = bits & ((1u << kind.mantissa_bits) - 1), top = (1u << kind.exponent_bits) - 1;
  const std::uint32_t exponent = bits >> kind.mantissa_bits & top;
  const double sign = bits >> (kind.mantissa_bits + kind.exponent_bits) & 1 ? -1 : 1;
  if (kind.infinities && exponent == top)
    return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  if (!kind.infinities && exponent == top && mantissa == 7) return std::numeric_limits<double>::quiet_NaN();
  const int power = static_cast<int>(exponent ? exponent : 1) - kind.bias() - kind.mantissa_bits;
  return sign * std::ldexp(mantissa + (exponent ? std::ldexp(1.0, kind.mantissa_bits) : 0.0), power);
}

inline double largest(Kind kind) {
  const double mantissa = kind.infinities ? 2 - std::ldexp(1.0, -kind.mantissa_bits) : 1.75;
  return std::ldexp(mantissa, kind.bias() + (kind.infinities ? 0 : 1));
}

inline double step_of(Kind kind, double v) {  // between neighbours of v
  const int least = 1 - kind.bias(), power = v == 0 ? least : std::max(std::ilogb(v), least);
  return std::ldexp(1.0, power - kind.mantissa_bits);
}

inline double rounded(Kind kind, double v) {  // half to even
  if (v == 0 || !std::isfinite(v)) return v;
  const double step = step_of(kind, v), near = std::nearbyint(v / step) * step;
  return std::fabs(near) > largest(kind) ? std::copysign(std::numeric_limits<double>::infinity(), v) : near;
}

// `count` numbers of a type, in a block of their own.
struct Numbers {
  Kind kind;
  Block block;

  Numbers(Kind k, std::int64_t count) : kind(k), block(static_cast<std::size_t>(count * k.bytes())) {}
  Numbers(Type type, std::int64_t count) : Numbers(kind_of(type), count) {}

  std::uint32_t bits(std::int64_t i) const {
    std::uint32_t result = 0;
    std::memcpy(&result, block.as<char>() + i * kind.bytes(), static_cast<std::size_t>(kind.bytes()));
    return result;
  }
  double operator[](std::int64_t i) const { return decode(kind, bits(i)); }
  std::int64_t count() const { return static_cast<std::int64_t>(block.size) / kind.bytes(); }
};

// ---------------------------------------------------------------------------------------------------------- 4-bit codes
inline int nibble(const std::uint8_t* row, std::int64_t k) { return row[k / 2] >> (k % 2 * 4) & 15; }

inline double code_value(Format format, int code) {
  static const double e2m1[8] = {0, .5, 1, 1.5, 2, 3, 4, 6};
  if (format == Format::int4) return code < 8 ? code : code - 16;
  if (format == Format::uint4) return code;
  return code < 8 ? e2m1[code] : -e2m1[code - 8];
}

inline double top_of(Format format) {
  return format == Format::int8 ? 127 : format == Format::int4 ? 7 : format == Format::uint4 ? 15 : 6;
}

// The code of v = x/scale in fp32, already within the format's range.
inline int code_of(Format format, float v) {
  if (format != Format::nvfp4) return static_cast<int>(std::nearbyint(v));
  int best = 0;
  for (int code = 1; code < 8; code++) {
    const double old = std::fabs(std::fabs(v) - code_value(format, best));
    const double now = std::fabs(std::fabs(v) - code_value(format, code));
    if (now < old || (now == old && code % 2 == 0)) best = code;
  }
  return best | (std::signbit(v) ? 8 : 0);
}

inline std::int64_t group_count(std::int64_t k, std::int64_t group) { return group ? (k + group - 1) / group : 1; }
inline std::int64_t group_of(std::int64_t k, std::int64_t group) { return group ? k / group : 0; }

// A quantized row of x̂: stored scales and codes.
struct QuantizedRow {
  std::vector<double> scales;
  std::vector<int> codes;

  QuantizedRow(const std::vector<float>& xhat, Format format, std::int64_t group, Kind scale_kind) {
    const auto k = static_cast<std::int64_t>(xhat.size());
    std::vector<float> top(static_cast<std::size_t>(group_count(k, group)), 0.0f);
    for (std::int64_t i = 0; i < k; i++) {
      float& t = top[group_of(i, group)];
      t = std::max(t, format == Format::uint4 ? xhat[i] : std::fabs(xhat[i]));
    }
    const auto most = static_cast<float>(top_of(format)), least = format == Format::uint4 ? 0.0f : -most;
    for (const float t : top) scales.push_back(rounded(scale_kind, std::min<double>(t / most, largest(scale_kind))));
    for (std::int64_t i = 0; i < k; i++) {
      const auto scale = static_cast<float>(scales[group_of(i, group)]);
      codes.push_back(scale > 0 ? code_of(format, std::min(std::max(xhat[i] / scale, least), most)) : 0);
    }
  }
};

// -------------------------------------------------------------------------------------------------------------- linears
// Row n of the weights: values in fp32, as formats.decode has them; and the sizes of what each is a sum of.
struct WeightRow {
  std::vector<float> w;
  std::vector<double> size;
  float s_ch = 0;
  std::vector<int> w8;

  void fold() { fold_by(largest() / 127); }

  float largest() const {
    float top = 0;
    for (const float v : w) top = std::max(top, std::fabs(v));
    return top;
  }
  void fold_by(float scale) {
    s_ch = scale;
    for (const float v : w) {
      const float code = std::min(std::max(v / s_ch, -127.0f), 127.0f);
      w8.push_back(s_ch > 0 ? code_of(Format::int8, code) : 0);
    }
  }

  // nvfp4, of codes that count `sizes` times their scale times the channel's: the best of three steps.
  void fold_nvfp4(const std::vector<float>& sizes, const std::vector<float>& scales, float channel) {
    const float top = largest(), plain = top / 127;
    float best = plain, least = fold_error(sizes, scales, channel / plain);
    for (const float part : {1.0f, 1.5f}) {
      const float step = channel * (power_of_two_above(top / 144 / channel / part) * part), ratio = step / plain;
      const float error = fold_error(sizes, scales, channel / step) * (ratio * ratio);
      if (!(error < least) || !(step > 0) || !(plain >= std::numeric_limits<float>::min())) continue;
      best = step;
      least = error;
    }
    fold_by(best);
  }
  static float fold_error(const std::vector<float>& sizes, const std::vector<float>& scales, float factor) {
    double sum = 0;
    for (std::size_t i = 0; i < sizes.size(); i++) {
      const float steps = sizes[i] * (scales[i] * factor), off = steps - std::nearbyint(std::min(steps, 127.0f));
      sum += std::pow(static_cast<double>(std::nearbyint(off * 32)), 2);
    }
    return static_cast<float>(sum);
  }
  static float power_of_two_above(float x) {
    int exponent = 0;
    return std::frexp(x, &exponent) == 0.5f ? x : std::ldexp(1.0f, exponent);
  }
};

inline double activate(double x, Activation activation) {
  if (activation == Activation::silu) return x / (1 + std::exp(-x));
  if (activation == Activation::gelu) return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
  if (activation == Activation::gelu_tanh)
    return x / (1 + std::exp(-2 * std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
  return x;
}

struct Value {
  double exact, slack;
};

inline bool near(double got, Kind kind, const Value& v) {
  const double most = std::fabs(v.exact) + v.slack;
  return std::fabs(got - v.exact) <= v.slack + step_of(kind, most) / 2 || most > largest(kind);
}

}  // namespace model
