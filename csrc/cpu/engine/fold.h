// The scale that a row of 4-bit weights folds to INT8 with, as formats.fold_int8 chooses it, and the fold itself.
#pragma once
#include "weights.h"

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

constexpr int fold_steps = 3;             // that are compared
constexpr float most_steps = 144;         // MOST_STEPS of formats.py
constexpr std::int64_t fold_vectors = 32;  // whose squared errors, each below 2^19, a float sums without rounding

// Half to even, of numbers below 2^22: an addition costs no more than rounding, and where there is no instruction for
// that, a tenth.
inline F rounded_by_adding(F x) {
  const F magic = Simd::set1(0x1.8p23f);
  return Simd::sub(Simd::add(x, magic), magic);
}

// Σ(32·e)² of a row for each step, e what a weight is off in steps: see _best_steps of formats.py. factors: channel/step.
struct FoldErrors {
  const Codes& w;
  float factors[fold_steps];
  F held[fold_steps];
  double sums[fold_steps] = {};
  std::int64_t vectors = 0;

  void run(std::int64_t n) {
    clear();
    for (std::int64_t g = 0; g < w.groups; g++) {
      F scaled[fold_steps];
      for (int i = 0; i < fold_steps; i++) scaled[i] = Simd::set1(w.scale(n, g) * factors[i]);
      const std::int64_t end = smaller((g + 1) * w.group, w.k);
      std::int64_t k = g * w.group;
      for (; k + W <= end; k += W) add(w.row(n) + k / 2, scaled);
      if (k == end) continue;
      std::uint8_t rest[W / 2] = {};
      std::memcpy(rest, w.row(n) + k / 2, static_cast<std::size_t>((end - k + 1) / 2));
      if ((end - k) % 2) rest[(end - k) / 2] &= 15;
      add(rest, scaled);
    }
    flush();
  }

  void add(const std::uint8_t* nibbles, const F (&scaled)[fold_steps]) {
    const F size = Simd::lookup(Simd::table(e2m1_sizes), Simd::load_nibbles(nibbles));
    for (int i = 0; i < fold_steps; i++) {
      const F steps = Simd::mul(size, scaled[i]);
      const F off = Simd::sub(steps, rounded_by_adding(Simd::min(steps, Simd::set1(127))));
      const F error = rounded_by_adding(Simd::mul(off, Simd::set1(32)));
      held[i] = Simd::fma(error, error, held[i]);
    }
    if (++vectors == fold_vectors) flush();
  }

  void clear() {
    for (F& part : held) part = Simd::zero();
    vectors = 0;
  }
  void flush() {
    for (int i = 0; i < fold_steps; i++) {
      float lanes[W];
      Simd::store(lanes, held[i]);
      for (const float lane : lanes) sums[i] += lane;
    }
    clear();
  }
};

// The least power of two that is no smaller than x, a positive normal number.
inline float power_of_two_above(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  bits = (bits + 0x7FFFFF) & 0x7F800000;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Of max|w|/127 and two steps of the row's own grid the one with the least squared error.
inline float nvfp4_row_scale(const Codes& w, std::int64_t n, float top) {
  const float plain = top / 127, channel = w.channel(n);
  if (!(plain >= smallest_normal)) return plain;  // zero, NaN, or too little of a step to choose
  float steps[fold_steps] = {plain};
  for (int i = 1; i < fold_steps; i++) {
    const float part = i == 1 ? 1.0f : 1.5f;
    steps[i] = channel * (power_of_two_above(top / most_steps / channel / part) * part);
  }
  FoldErrors found{w, {channel / steps[0], channel / steps[1], channel / steps[2]}, {}};
  found.run(n);
  float best = plain, least = static_cast<float>(found.sums[0]);
  for (int i = 1; i < fold_steps; i++) {
    const float ratio = steps[i] / plain, error = static_cast<float>(found.sums[i]) * (ratio * ratio);
    if (!(error < least) || !(steps[i] > 0)) continue;
    best = steps[i];
    least = error;
  }
  return best;
}

// One scale per row for INT8, as formats.fold_int8.
inline float row_scale(const Codes& w, std::int64_t n) {
  const float top = row_top(w, n);
  return w.format == Format::nvfp4 ? nvfp4_row_scale(w, n, top) : top / 127;
}

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
