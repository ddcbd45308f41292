// quantize_act and norm_modulate_quantize: a row is read once, into fp32; its codes, its scales and its share of
// h = x·downᵀ are made from that.
#pragma once
#include "linear.h"

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

// The largest finite number of a scale's type.
inline float largest_of(Type type) {
  return type == Type::f32 ? largest_float : type == Type::bf16 ? 3.3895313892515355e38f : 65504.0f;
}

inline float top_of(Format format) {
  return format == Format::int8 ? 127 : format == Format::int4 ? 7 : format == Format::uint4 ? 15 : 6;
}

// e2m1 codes of v in [−6, 6]. With 2^e ≤ |v|, adding and taking away 1.5·2^23 steps of max(2^e, 1)/2 rounds to a step.
inline void e2m1_codes(std::int8_t* codes, const float* values, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i++) {
    const float v = values[i];
    const float power = std::bit_cast<float>(std::bit_cast<std::uint32_t>(v) & 0x7F800000u);
    const float magic = (power > 1 ? power : 1) * (0.75f * 8388608.0f);
    const float rounded = v + magic - magic;
    const int twice = static_cast<int>(rounded < 0 ? -2 * rounded : 2 * rounded);  // 0 1 2 3 4 6 8 12
    const int small = twice < (twice >> 1) + 2 ? twice : (twice >> 1) + 2;
    const int magnitude = small < (twice >> 2) + 4 ? small : (twice >> 2) + 4;
    codes[i] = static_cast<std::int8_t>(magnitude | (std::bit_cast<std::uint32_t>(v) >> 31 << 3));
  }
}

class Quantize {
 public:
  explicit Quantize(const QuantizeArguments& arguments)
      : a(arguments),
        half(DotBf16::per_word == 2 && a.x.type == Type::bf16),
        padded(padded_depth(a.k)),
        depth(half ? padded / DotBf16::per_word : padded),
        stride(depth + row_padding),
        rank(round_up(a.r, W)),
        groups(a.group ? (a.k + a.group - 1) / a.group : 1),
        group(a.group ? a.group : padded) {}

  void run() const {
    static thread_local Scratch scratch;
    if (a.m == 0) return;
    auto* down = static_cast<std::int32_t*>(scratch.get(static_cast<std::size_t>(4 * rank * depth)));
    const std::int64_t vectors = rank / W;
    if (rank) parallel(a.threads, vectors, [&](std::int64_t v) { pack_down(down, v); });
    parallel(a.threads, (a.m + rows - 1) / rows, [&](std::int64_t item) { quantize_rows(item * rows, down); });
  }

 private:
  static constexpr std::int64_t rows = 2 * tile_rows;  // done together, so that `down` is read once for them

  // A row as the words of the branch's product: of `data`'s own type where two bf16 are multiplied at once, else fp32.
  void stage(std::int32_t* out, const void* data, Type type, std::int64_t place) const {
    if (!half) return to_floats(reinterpret_cast<float*>(out), at(data, type, place), type, a.k, padded);
    copy(out, at(data, type, place), 2 * a.k);
    std::memset(reinterpret_cast<std::uint16_t*>(out) + a.k, 0, static_cast<std::size_t>(2 * (padded - a.k)));
  }

  void pack_down(std::int32_t* down, std::int64_t v) const {
    static thread_local Scratch scratch;
    auto* staged = static_cast<std::int32_t*>(scratch.get(static_cast<std::size_t>(4 * W * stride)));
    for (std::int64_t i = 0; i < W; i++)
      stage(staged + i * stride, a.down, a.x.type, smaller(v * W + i, a.r - 1) * a.k);
    pack_columns(down + v * W * depth, staged, stride, depth);
  }

  void quantize_rows(std::int64_t first, const std::int32_t* down) const {
    static thread_local Scratch scratch;
    const std::int64_t count = smaller(rows, a.m - first);
    char* memory =
        static_cast<char*>(scratch.get(static_cast<std::size_t>(4 * (rows * (stride + rank) + padded) + padded + 512)));
    auto* staged = carve<std::int32_t>(memory, rows * stride);
    float* h = carve<float>(memory, rows * rank);
    float* x = carve<float>(memory, padded);
    auto* codes = carve<std::int8_t>(memory, padded);
    for (std::int64_t i = 0; i < count; i++) {
      to_floats(x, at(a.x.data, a.x.type, (first + i) * a.k), a.x.type, a.k, padded);
      if (a.norm != Norm::none) normalize(x, first + i);
      if (rank) stage_row(staged + i * stride, x, first + i);
      quantize_row(first + i, x, codes);
    }
    if (!rank) return;
    [[maybe_unused]] const TileScope tiles;
    if (half)
      product<DotBf16>(staged, stride, count, down, rank / W, depth, h, rank, false);
    else
      product<DotFloat>(staged, stride, count, down, rank / W, depth, h, rank, false);
    for (std::int64_t i = 0; i < count; i++)
      std::memcpy(a.h + (first + i) * a.r, h + i * rank, static_cast<std::size_t>(4 * a.r));
  }

  void stage_row(std::int32_t* out, const float* x, std::int64_t m) const {
    if (!half) {
      std::memcpy(out, x, static_cast<std::size_t>(4 * padded));
    } else if (a.norm == Norm::none) {
      stage(out, a.x.data, a.x.type, m * a.k);
    } else {
      for (std::int64_t k = 0; k < padded; k += W)
        Simd::store_bf16(reinterpret_cast<std::uint16_t*>(out) + k, Simd::load(x + k));
    }
  }

  // x → norm(x)·weight·(1 + scale) + shift, rounded to x's type.
  void normalize(float* x, std::int64_t m) const {
    const std::int64_t sample = m / (a.m / a.samples) * a.k;
    const float n = static_cast<float>(a.k), mean = a.norm == Norm::layer ? sum<false>(x, 0) / n : 0;
    const F centre = Simd::set1(mean), scale = Simd::set1(1 / std::sqrt(sum<true>(x, mean) / n + a.eps));
    for (std::int64_t k = 0; k < a.k; k += W) {
      const std::int64_t count = a.k - k;
      const F weight = load_some(at(a.norm_weight.data, a.norm_weight.type, k), a.norm_weight.type, count);
      const F gain = load_some(at(a.scale.data, a.scale.type, sample + k), a.scale.type, count);
      const F shift =
          load_some(at(a.modulate_shift.data, a.modulate_shift.type, sample + k), a.modulate_shift.type, count);
      F v = Simd::mul(Simd::mul(Simd::sub(Simd::load(x + k), centre), scale), weight);
      v = Simd::add(Simd::mul(v, Simd::add(Simd::set1(1), gain)), shift);
      store_some(x + k, Type::f32, round_to(a.x.type, v), count);
    }
  }

  // Σ x, or Σ (x − mean)²: in fp64 between vectors, so that long rows keep their digits.
  template <bool squared>
  double sum(const float* x, float mean) const {
    double total = 0;
    for (std::int64_t k = 0; k < a.k; k += 16 * W) {
      F part = Simd::zero();
      const std::int64_t end = smaller(k + 16 * W, a.k);
      std::int64_t i = k;
      for (; i + W <= end; i += W) {
        const F v = Simd::sub(Simd::load(x + i), Simd::set1(mean));
        part = squared ? Simd::fma(v, v, part) : Simd::add(part, v);
      }
      total += static_cast<double>(Simd::reduce_add(part));
      for (; i < end; i++) total += squared ? static_cast<double>(x[i] - mean) * (x[i] - mean) : x[i] - mean;
    }
    return total;
  }

  // x̂ takes the place of x.
  void quantize_row(std::int64_t m, float* x, std::int8_t* codes) const {
    if (a.format == Format::none) {
      smooth(x, 0, padded);
      return store_half(m, x);
    }
    for (std::int64_t g = 0; g < groups; g++) {
      const std::int64_t begin = g * group, end = smaller(begin + group, padded);
      const float scale = store_scale(m, g, smooth(x, begin, end) / top_of(a.format));
      encode(codes + begin, x + begin, end - begin, scale);
    }
    if (a.format == Format::nvfp4) e2m1_codes(codes, x, padded);
    if (a.format == Format::int8)
      copy(static_cast<std::int8_t*>(a.qx) + m * a.k, codes, a.k);
    else
      pack_nibbles(static_cast<std::uint8_t*>(a.qx) + m * ((a.k + 1) / 2), codes);
  }

  // x̂ = (x + shift)·inv_smooth of columns [begin, end). Returns max|x̂|, or max(x̂, 0) for codes without a sign; NaN
  // where a number is not finite, which shows in its bits: those of ∞ and NaN are larger, as integers, than any
  // number's.
  float smooth(float* x, std::int64_t begin, std::int64_t end) const {
    const F shift = Simd::set1(a.shift);
    I bits = Simd::zero_int();
    F most = Simd::zero();
    for (std::int64_t k = begin; k < end; k += W) {
      const F inverse =
          k + W <= a.k ? Simd::load(a.inv_smooth + k) : load_some(a.inv_smooth + k, Type::f32, a.k > k ? a.k - k : 0);
      const F v = Simd::mul(Simd::add(Simd::load(x + k), shift), inverse);
      Simd::store(x + k, v);
      bits = Simd::max_int(bits, Simd::abs_bits(v));
      most = Simd::max(most, v);
    }
    const std::int32_t largest = Simd::reduce_max_int(bits);
    if (largest >= 0x7F800000) return not_a_number;
    return a.format == Format::uint4 ? Simd::reduce_max(most) : std::bit_cast<float>(largest);
  }

  void store_half(std::int64_t m, const float* xhat) const {
    for (std::int64_t k = 0; k < a.k; k += W)
      store_some(at(a.qx, a.x.type, m * a.k + k), a.x.type, Simd::load(xhat + k), a.k - k);
  }

  // Rounds the scale to its stored type, stores it, and returns what was stored.
  float store_scale(std::int64_t m, std::int64_t g, float scale) const {
    const std::int64_t place = m * groups + g;
    if (a.format == Format::int8) return static_cast<float*>(a.sx)[m] = scale;
    if (a.format == Format::nvfp4) {
      const std::uint8_t bits = e4m3_bits(scale > 448 ? 448 : scale);
      static_cast<std::uint8_t*>(a.sx)[place] = bits;
      return e4m3_values[bits];
    }
    const float most = largest_of(a.x.type), kept = scale > most ? most : scale;
    if (a.x.type == Type::f32) return static_cast<float*>(a.sx)[place] = kept;
    const std::uint16_t bits = a.x.type == Type::bf16 ? bf16_bits(kept) : f16_bits(kept);
    static_cast<std::uint16_t*>(a.sx)[place] = bits;
    return number(a.sx, a.x.type, place);
  }

  void encode(std::int8_t* codes, float* x, std::int64_t count, float scale) const {
    if (!(scale > 0)) {  // zero, or NaN
      std::memset(codes, 0, static_cast<std::size_t>(count));
      std::memset(x, 0, static_cast<std::size_t>(4 * count));
      return;
    }
    const float most = top_of(a.format);
    const F divisor = Simd::set1(scale), high = Simd::set1(most),
            low = Simd::set1(a.format == Format::uint4 ? 0 : -most);
    for (std::int64_t k = 0; k < count; k += W) {
      const F v = Simd::min(Simd::max(Simd::div(Simd::load(x + k), divisor), low), high);
      if (a.format == Format::nvfp4)
        Simd::store(x + k, v);
      else
        Simd::store_int8(codes + k, Simd::to_int(v));
    }
  }

  void pack_nibbles(std::uint8_t* out, const std::int8_t* codes) const {
    for (std::int64_t i = 0; i < a.k / 2; i++)
      out[i] = static_cast<std::uint8_t>((codes[2 * i] & 15) | (codes[2 * i + 1] & 15) << 4);
    if (a.k % 2) out[a.k / 2] = codes[a.k - 1] & 15;  // not −0, which past the end a negative shift may leave
  }

  const QuantizeArguments& a;
  const bool half;
  const std::int64_t padded, depth, stride, rank, groups, group;
};

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
