// W4A16 for a few tokens: bound by reading the weights, so every row is decoded in registers, straight into the sums.
#pragma once
#include "linear.h"

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

constexpr std::int64_t gemv_tokens = 4;

// Tokens as fp32, in the order in which codes are taken: 2W at a time, those of low nibbles before those of high ones.
inline void deinterleave(float* out, const float* x, std::int64_t k) {
  for (std::int64_t at = 0; at < k; at += 2 * W)
    for (int i = 0; i < W; i++) {
      out[at + i] = x[at + 2 * i];
      out[at + W + i] = x[at + 2 * i + 1];
    }
}

class Gemv {
 public:
  explicit Gemv(const LinearArguments& arguments)
      : a(arguments), loop(a), padded(padded_depth(a.k)), paired(loop.w.group % (2 * W) == 0) {}

  void run() const {
    static thread_local Scratch scratch;
    float* x = static_cast<float*>(scratch.get(static_cast<std::size_t>(4 * padded * (a.m + 1))));
    for (std::int64_t m = 0; m < a.m; m++) {
      float* plain = paired ? x + a.m * padded : x + m * padded;
      to_floats(plain, at(a.qx, a.out, m * a.k), a.out, a.k, padded);
      if (paired) deinterleave(x + m * padded, plain, padded);
    }
    const std::int64_t panels = panel_count(a, rows);
    const std::int64_t together = panels / (16 * a.threads) + 1;  // neighbours, so that memory is read in order
    parallel(a.threads, (panels + together - 1) / together, [&](std::int64_t item) {
      for (std::int64_t i = item * together; i < smaller((item + 1) * together, panels); i++) panel(i, x);
    });
  }

 private:
  static constexpr std::int64_t rows = 2 * W;

  void panel(std::int64_t index, const float* x) const {
    static thread_local Scratch scratch;
    const Panel p = panel_of(a, index, rows);
    const std::int64_t rank = round_up(a.r, W);
    char* memory = static_cast<char*>(scratch.get(static_cast<std::size_t>(4 * (p.rows * (rank + gemv_tokens + 1) + rank) + 256)));
    float* up = carve<float>(memory, p.rows * rank);
    float* bias = carve<float>(memory, p.rows);
    float* y = carve<float>(memory, p.rows * gemv_tokens);  // (tokens, rows)
    float* h = carve<float>(memory, rank);
    for (std::int64_t i = 0; i < p.rows; i++) {
      const std::int64_t n = p.channel(i);
      if (rank) to_floats(up + i * rank, at(a.up.data, a.up.type, n * a.r), a.up.type, a.r, rank);
      bias[i] = number(a.bias.data, a.bias.type, n);
      if (i && n == p.channel(i - 1)) continue;  // void
      switch (a.m) {
        case 1: row<1>(n, x, y + i, p.rows); break;
        case 2: row<2>(n, x, y + i, p.rows); break;
        case 3: row<3>(n, x, y + i, p.rows); break;
        default: row<4>(n, x, y + i, p.rows);
      }
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

  // y[t·step] = Σ_k x[t,k]·w[n,k]
  template <int tokens>
  void row(std::int64_t n, const float* x, float* y, std::int64_t step) const {
    F low[tokens], high[tokens];
    for (int t = 0; t < tokens; t++) low[t] = high[t] = Simd::zero();
    const std::uint8_t* codes = loop.w.row(n);
    const std::int64_t group = loop.w.group ? loop.w.group : a.k;
    for (std::int64_t g = 0; g < loop.w.groups(); g++) {
      alignas(64) float table[16];
      loop.rounded_table(table, n, g);
      const std::int64_t begin = g * group, end = smaller(begin + group, a.k);
      std::int64_t k = begin;
      for (; paired && k + 2 * W <= end; k += 2 * W) pair<tokens>(table, codes + k / 2, x + k, low, high);
      for (; !paired && k + W <= end; k += W) single<tokens>(table, codes + k / 2, x + k, low);
      if (k == end) continue;
      std::uint8_t rest[W] = {};  // codes past the end meet zeros of x
      std::memcpy(rest, codes + k / 2, static_cast<std::size_t>((end - k + 1) / 2));
      if (paired)
        pair<tokens>(table, rest, x + k, low, high);
      else
        single<tokens>(table, rest, x + k, low);
    }
    for (int t = 0; t < tokens; t++) y[t * step] = Simd::reduce_add(Simd::add(low[t], high[t]));
  }

  template <int tokens>
  void pair(const float* table, const std::uint8_t* codes, const float* x, F* low, F* high) const {
    I even, odd;
    Simd::load_pairs(codes, even, odd);
    const F first = Simd::lookup(table, even), second = Simd::lookup(table, odd);
    for (int t = 0; t < tokens; t++) {
      low[t] = Simd::fma(first, Simd::load(x + t * padded), low[t]);
      high[t] = Simd::fma(second, Simd::load(x + t * padded + W), high[t]);
    }
  }

  template <int tokens>
  void single(const float* table, const std::uint8_t* codes, const float* x, F* sums) const {
    const F w = Simd::lookup(table, Simd::load_nibbles(codes));
    for (int t = 0; t < tokens; t++) sums[t] = Simd::fma(w, Simd::load(x + t * padded), sums[t]);
  }

  const LinearArguments& a;
  const W4A16<DotFloat> loop;
  const std::int64_t padded;
  const bool paired;
};

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
