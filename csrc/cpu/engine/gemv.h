// W4A16 for a few tokens: bound by reading the weights, so every row is decoded in registers, straight into the sums.
#pragma once
#include "linear.h"

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

constexpr std::int64_t gemv_tokens = 16;

inline F total(F sum) {
  return sum;
}
inline F zero(const F&) {
  return Simd::zero();
}

struct TwoSums {
  F low, high;
};
inline F total(TwoSums sum) {
  return Simd::add(sum.low, sum.high);
}
inline TwoSums zero(const TwoSums&) {
  return {Simd::zero(), Simd::zero()};
}

// How 2W codes, in W bytes, meet tokens: in fp32, those of low nibbles before those of high ones.
struct PairsOfFloats {
  using Sum = F;
  using Table = Simd::Table;
  static constexpr std::int64_t step = 2 * W;
  static constexpr std::int64_t words_per_step = 2 * W;  // of a token

  static Table table(const Sixteen& values, Type type) { return values.rounded_to(type).held(); }
  static void stage(std::int32_t* out, const void* row, Type type, std::int64_t k, std::int64_t padded) {
    float* x = reinterpret_cast<float*>(out);
    to_floats(x, row, type, k, padded);
    for (std::int64_t at = 0; at < padded; at += step) {
      float both[step];
      for (int i = 0; i < W; i++) {
        both[i] = x[at + 2 * i];
        both[W + i] = x[at + 2 * i + 1];
      }
      std::memcpy(x + at, both, sizeof both);
    }
  }
  struct Weights {
    F low, high;
  };
  static Weights decode(const Table& table, const std::uint8_t* codes) {
    I even, odd;
    Simd::load_pairs(codes, even, odd);
    return {Simd::lookup(table, even), Simd::lookup(table, odd)};
  }
  static F dot(F sum, const Weights& w, const std::int32_t* x) {
    sum = Simd::fma(w.low, Simd::as_float(Simd::load_int(x)), sum);
    return Simd::fma(w.high, Simd::as_float(Simd::load_int(x + W)), sum);
  }
};

// W codes at a time, in their order: for groups that 2W does not divide.
struct SingleFloats {
  using Sum = F;
  using Table = Simd::Table;
  static constexpr std::int64_t step = W;
  static constexpr std::int64_t words_per_step = W;

  static Table table(const Sixteen& values, Type type) { return values.rounded_to(type).held(); }
  static void stage(std::int32_t* out, const void* row, Type type, std::int64_t k, std::int64_t padded) {
    to_floats(reinterpret_cast<float*>(out), row, type, k, padded);
  }
  using Weights = F;
  static F decode(const Table& table, const std::uint8_t* codes) {
    return Simd::lookup(table, Simd::load_nibbles(codes));
  }
  static F dot(F sum, F w, const std::int32_t* x) { return Simd::fma(w, Simd::as_float(Simd::load_int(x)), sum); }
};

#if defined(NUNCHAKU_PY_AVX512_BF16)
// Pairs of bf16, two products at once.
struct PairsOfHalves {
  using Sum = F;
  using Table = Simd::HalfTable;
  static constexpr std::int64_t step = 32;
  static constexpr std::int64_t words_per_step = 16;

  static Table table(const Sixteen& values, Type) { return Simd::half_table(values.part[0]); }
  static void stage(std::int32_t* out, const void* row, Type, std::int64_t k, std::int64_t padded) {
    copy(out, row, 2 * k);
    std::memset(reinterpret_cast<std::uint16_t*>(out) + k, 0, static_cast<std::size_t>(2 * (padded - k)));
  }
  using Weights = I;
  static I decode(const Table& table, const std::uint8_t* codes) { return Simd::lookup_half(table, codes); }
  static F dot(F sum, I w, const std::int32_t* x) { return Simd::dot_words(sum, w, Simd::load_int(x)); }
};

// The same for groups of 64, two of them at once: fewer instructions for each weight.
struct QuadsOfHalves {
  using Sum = TwoSums;
  using Weights = Simd::Quads;
  static constexpr std::int64_t step = 128;
  static constexpr std::int64_t words_per_step = 64;

  static void stage(std::int32_t* out, const void* row, Type, std::int64_t k, std::int64_t padded) {
    const auto* from = static_cast<const std::uint16_t*>(row);
    auto* to = reinterpret_cast<std::uint16_t*>(out);
    for (std::int64_t i = 0; i < padded; i++) {
      const std::int64_t within = i % step, source = i - within + within % 32 * 4 + within / 32;
      to[i] = source < k ? from[source] : 0;
    }
  }
  static Weights decode(const Sixteen& first, const Sixteen& second, const std::uint8_t* codes) {
    return Simd::lookup_quads(Simd::half_tables(first.part[0], second.part[0]), codes);
  }
  static TwoSums dot(TwoSums sum, const Weights& w, const std::int32_t* x) {
    const F low = Simd::dot_words(sum.low, w.part0, Simd::load_int(x));
    const F high = Simd::dot_words(sum.high, w.part1, Simd::load_int(x + W));
    return {Simd::dot_words(low, w.part2, Simd::load_int(x + 2 * W)),
            Simd::dot_words(high, w.part3, Simd::load_int(x + 3 * W))};
  }
};
#endif

// One sum per token. Not an array: the compiler would keep it in memory, and wait for it at every step.
template <class Way, int tokens>
struct Sums {
  typename Way::Sum sum;
  Sums<Way, tokens - 1> others;

  Sums() : sum(zero(sum)) {}  // said, because GCC makes implicit ones without this file's instruction set
  void add(const typename Way::Weights& w, const std::int32_t* x, std::int64_t stride) {
    sum = Way::dot(sum, w, x);
    others.add(w, x + stride, stride);
  }
  void store(float* y, std::int64_t step, const Sums& also) const {
    *y = Simd::reduce_add(Simd::add(total(sum), total(also.sum)));
    others.store(y + step, step, also.others);
  }
};
template <class Way>
struct Sums<Way, 0> {
  void add(const typename Way::Weights&, const std::int32_t*, std::int64_t) {}
  void store(float*, std::int64_t, const Sums&) const {}
};

template <class Way>
class Gemv {
 public:
  explicit Gemv(const LinearArguments& arguments)
      : a(arguments),
        w(arguments),
        padded(round_up(padded_depth(a.k), Way::step)),
        words(padded / Way::step * Way::words_per_step),
        tokens(a.m <= 2   ? a.m
               : a.m <= 4 ? 4
               : a.m <= 8 ? 8
                          : 16) {}

  void run() const {
    static thread_local Scratch scratch;
    if (a.m == 0 || a.n == 0) return;
    auto* x = static_cast<std::int32_t*>(scratch.get(static_cast<std::size_t>(4 * words * tokens)));
    for (std::int64_t m = 0; m < tokens; m++)  // those beyond the last repeat it
      Way::stage(x + m * words, at(a.qx, a.x, smaller(m, a.m - 1) * a.k), a.x, a.k, padded);
    const std::int64_t panels = panel_count(a, rows);
    const std::int64_t together = panels / (16 * a.threads) + 1;  // neighbours, so that memory is read in order
    parallel(a.threads, (panels + together - 1) / together, [&](std::int64_t item) {
      for (std::int64_t i = item * together; i < smaller((item + 1) * together, panels); i++) panel(i, x);
    });
  }

 private:
  static constexpr std::int64_t rows = 2 * W;

  void panel(std::int64_t index, const std::int32_t* x) const {
    static thread_local Scratch scratch;
    const Panel p = panel_of(a, index, rows);
    const std::int64_t rank = round_up(a.r, W);
    const std::int64_t floats = p.rows * (rank + tokens + 1) + rank + 2 * (w.groups + W);
    char* memory = static_cast<char*>(scratch.get(static_cast<std::size_t>(4 * floats + 512)));
    float* up = carve<float>(memory, p.rows * rank);
    float* bias = carve<float>(memory, p.rows);
    float* y = carve<float>(memory, p.rows * tokens);  // (tokens, rows)
    float* h = carve<float>(memory, rank);
    float* scales = carve<float>(memory, 2 * (w.groups + W));
    for (std::int64_t i = 0; i < p.rows; i++) {
      const std::int64_t n = p.channel(i);
      if (rank) to_floats(up + i * rank, at(a.up.data, a.up.type, n * a.r), a.up.type, a.r, rank);
      bias[i] = number(a.bias.data, a.bias.type, n);
      if (i == 0 || n != p.channel(i - 1)) row_of(n, x, scales, y + i, p.rows);
    }
    for (std::int64_t m = 0; m < a.m; m++) {
      if (rank) to_floats(h, a.h + m * a.r, Type::f32, a.r, rank);
      for (std::int64_t i = 0; rank && i < p.rows; i++) y[m * p.rows + i] += dot(h, up + i * rank, rank);
      finish_token(a, p, m, y + m * p.rows, bias);
    }
  }

  static float dot(const float* x, const float* y, std::int64_t count) {
    F sum = Simd::zero();
    for (std::int64_t i = 0; i < count; i += W) sum = Simd::fma(Simd::load(x + i), Simd::load(y + i), sum);
    return Simd::reduce_add(sum);
  }

  void row_of(std::int64_t n, const std::int32_t* x, float* scales, float* y, std::int64_t step) const {
    switch (tokens) {
      case 1:
        return row<1>(n, x, scales, y, step);
      case 2:
        return row<2>(n, x, scales, y, step);
      case 4:
        return row<4>(n, x, scales, y, step);
      case 8:
        return row<8>(n, x, scales, y, step);
      default:
        return row<16>(n, x, scales, y, step);
    }
  }

  // y[t·step] = Σ_k x[t,k]·w[n,k]; scales: room for the row's.
  template <int count>
  void row(std::int64_t n, const std::int32_t* x, float* scales, float* y, std::int64_t step) const {
    if constexpr (Way::step == 128)
      row_of_blocks<count>(n, x, scales, y, step);
    else
      row_of_groups<count>(n, x, scales, y, step);
  }

  // Blocks of two groups.
  template <int count>
  void row_of_blocks(std::int64_t n, const std::int32_t* x, float* scales, float* y, std::int64_t step) const {
    Sums<Way, count> sums, others;  // two chains, again
    w.row_scales(n, scales);
    const std::int64_t groups = w.groups, stride = words, k_end = w.k;
    const float* zeros = scales + (w.format == Format::uint4 ? round_up(groups, W) : 0);
    const float channel = w.channel(n);
    const std::uint8_t* codes = w.row(n);
    std::uint8_t rest[Way::step / 2] = {};  // codes past the end meet zeros of x
    const auto add = [&](Sums<Way, count>& to, std::int64_t g, const std::uint8_t* place) {
      const std::int64_t next = smaller(g + 1, groups - 1);
      to.add(Way::decode(w.table(scales[g], zeros[g], channel), w.table(scales[next], zeros[next], channel), place),
             x + g * block / 2, stride);
    };
    std::int64_t g = 0;
    for (; (g + 4) * block <= k_end; g += 4) {
      add(sums, g, codes + g * block / 2);
      add(others, g + 2, codes + (g + 2) * block / 2);
    }
    for (; g < groups; g += 2) {
      std::uint8_t rest[Way::step / 2] = {};  // codes past the end meet zeros of x
      const std::int64_t left = smaller(Way::step, k_end - g * block);
      std::memcpy(rest, codes + g * block / 2, static_cast<std::size_t>((left + 1) / 2));
      if (left % 2) rest[left / 2] &= 15;  // or ∞·0 would be NaN
      add(sums, g, rest);
    }
    sums.store(y, step, others);
  }

  template <int count>
  void row_of_groups(std::int64_t n, const std::int32_t* x, float* scales, float* y, std::int64_t step) const {
    Sums<Way, count> sums, others;  // two chains of sums hide the latency of one; many tokens hide it by themselves
    constexpr int chains = count > 4 ? 1 : 2;
    w.row_scales(n, scales);
    // In variables of their own: what is written to memory could be them, for all the compiler knows.
    const std::int64_t group = w.group, groups = w.groups, stride = words;
    const std::int64_t zeros = w.format == Format::uint4 ? round_up(groups, W) : 0;
    const float channel = w.channel(n);
    const Type type = a.x;
    const std::uint8_t* codes = w.row(n);
    std::int64_t left = w.k;
    for (std::int64_t g = 0; g < groups; g++) {
      const typename Way::Table table = Way::table(w.table(scales[g], scales[zeros + g], channel), type);
      std::int64_t here = smaller(group, left);
      left -= here;
      for (; here >= chains * Way::step; here -= chains * Way::step) {
        sums.add(Way::decode(table, codes), x, stride);
        if constexpr (chains > 1)
          others.add(Way::decode(table, codes + Way::step / 2), x + Way::words_per_step, stride);
        codes += chains * Way::step / 2;
        x += chains * Way::words_per_step;
      }
      for (; here > 0; here -= Way::step) {
        std::uint8_t rest[Way::step / 2] = {};  // codes past the end meet zeros of x
        const std::int64_t some = smaller(Way::step, here);
        std::memcpy(rest, codes, static_cast<std::size_t>((some + 1) / 2));
        if (some % 2) rest[some / 2] &= 15;  // as zeros of weights, or ∞·0 would be NaN
        sums.add(Way::decode(table, rest), x, stride);
        codes += some / 2;
        x += Way::words_per_step;
      }
    }
    sums.store(y, step, others);
  }

  const LinearArguments& a;
  const Codes w;
  const std::int64_t padded, words, tokens;
};

inline void gemv(const LinearArguments& a) {
  if (a.group % (2 * W)) return Gemv<SingleFloats>(a).run();
#if defined(NUNCHAKU_PY_AVX512_BF16)
  if (a.x == Type::bf16 && a.group == 64 && a.m <= 8) return Gemv<QuadsOfHalves>(a).run();
  if (a.x == Type::bf16) return Gemv<PairsOfHalves>(a).run();
#endif
  Gemv<PairsOfFloats>(a).run();
}

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
