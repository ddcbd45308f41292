// What follows the product: the low-rank branch, bias, activation or gate, and the store. Weights were rows so far;
// here a piece of C is turned, so that tokens are rows and channels are vectors.
#pragma once
#include "numbers.h"

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

constexpr std::int64_t token_step = tile_vectors * W;  // tokens that are finished at a time

// A panel: some output channels, whose weights are expanded together. With a gated activation the first half of its
// rows are values, the second half their gates, and it makes half as many outputs.
struct Panel {
  std::int64_t first = 0;       // output channel of row 0
  std::int64_t outputs = 0;     // outputs that exist
  std::int64_t rows = 0;        // rows, a multiple of W; those without an output are void
  std::int64_t gate_row = 0;    // where gates begin
  std::int64_t gate_first = 0;  // and their channel

  // The channel of a row; rows without a channel repeat the last one.
  std::int64_t channel(std::int64_t row) const {
    const bool gate = gate_row && row >= gate_row;
    const std::int64_t within = gate ? row - gate_row : row;
    return (gate ? gate_first : first) + smaller(within, outputs - 1);
  }
};

inline Panel panel_of(const LinearArguments& a, std::int64_t index, std::int64_t rows) {
  Panel p;
  const bool glu = a.ending == Ending::glu;
  const std::int64_t channels = glu ? a.n / 2 : a.n, step = glu ? rows / 2 : rows;
  p.first = index * step;
  p.outputs = smaller(step, channels - p.first);
  const std::int64_t padded = round_up(p.outputs, W);
  p.rows = glu ? 2 * padded : padded;
  if (!glu) return p;
  p.gate_row = padded;
  p.gate_first = p.first + channels;
  if (a.gate_first) {
    p.gate_first = p.first;
    p.first += channels;
  }
  return p;
}

inline std::int64_t panel_count(const LinearArguments& a, std::int64_t rows) {
  const bool glu = a.ending == Ending::glu;
  const std::int64_t channels = glu ? a.n / 2 : a.n, step = glu ? rows / 2 : rows;
  return (channels + step - 1) / step;
}

// One token: row (p.rows) of the product in fp32 → its outputs.
inline void finish_token(const LinearArguments& a, const Panel& p, std::int64_t token, const float* row,
                         const float* bias) {
  const std::int64_t width = a.ending == Ending::glu ? a.n / 2 : a.n;
  const std::int64_t first = p.gate_row && a.gate_first ? p.gate_first : p.first, place = token * width + first;
  const std::int64_t sample = a.ending == Ending::gate_residual ? token / (a.m / a.samples) : 0;
  for (std::int64_t i = 0; i < p.outputs; i += W) {
    const std::int64_t count = p.outputs - i;
    F v = Simd::add(Simd::load(row + i), Simd::load(bias + i));
    if (a.ending == Ending::activate) v = activate(v, a.activation);
    if (a.ending == Ending::glu) {
      const F gate = Simd::add(Simd::load(row + p.gate_row + i), Simd::load(bias + p.gate_row + i));
      v = Simd::mul(v, activate(gate, a.activation));
    }
    if (a.ending == Ending::gate_residual) {
      const F gate = load_some(at(a.gate.data, a.gate.type, sample * a.n + first + i), a.gate.type, count);
      v = Simd::add(load_some(at(a.residual, a.out, place + i), a.out, count), Simd::mul(v, gate));
    }
    store_some(at(a.y, a.out, place + i), a.out, v, count);
  }
}

// c: (p.rows, token_step) fp32, tokens from `token` to at most `end`; turned: room for (W, p.rows).
inline void finish(const LinearArguments& a, const Panel& p, std::int64_t token, std::int64_t end, const float* c,
                   float* turned, const float* bias) {
  const std::int64_t tokens = smaller(token_step, end - token);
  for (std::int64_t t = 0; t < tokens; t += W) {
    for (std::int64_t i = 0; i < p.rows; i += W)
      Simd::transpose(reinterpret_cast<std::int32_t*>(turned + i), p.rows,
                      reinterpret_cast<const std::int32_t*>(c + i * token_step + t), token_step);
    for (std::int64_t j = 0; j < smaller(W, tokens - t); j++)
      finish_token(a, p, token + t + j, turned + j * p.rows, bias);
  }
}

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
