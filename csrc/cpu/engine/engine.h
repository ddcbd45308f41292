// The ops of one instruction set, by which the rest of the program calls them.
#pragma once
#include "gemv.h"
#include "peak.h"
#include "quantize.h"
#include "round_rows.h"
#include "sweep.h"

namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA {

inline void quantize_act(const QuantizeArguments& a) {
  Quantize(a).run();
}

inline void linear(const LinearArguments& a) {
  if (a.act == Format::int8) return Linear<W4A8>(a).run();
  if (a.act != Format::none) return Linear<W4A4>(a).run();
  if (a.m <= gemv_tokens && a.weight != Format::int8) return gemv(a);
  if (a.x == Type::bf16) return Linear<W4A16<DotBf16>>(a).run();
  Linear<W4A16<DotFloat>>(a).run();
}

// Zero where the instruction set has no instruction for it.
inline Peak peak() {
  const bool int8 = DotInt8::per_word == 4, bf16 = DotBf16::per_word == 2;
  return {int8 ? peak_of<DotInt8>() : 0, bf16 ? peak_of<DotBf16>() : 0, peak_of<DotFloat>()};
}

inline void row_scales(const LinearArguments& a) {
  const Codes w(a);
  constexpr std::int64_t together = 16;
  parallel(a.threads, (a.n + together - 1) / together, [&](std::int64_t item) {
    for (std::int64_t n = item * together; n < smaller((item + 1) * together, a.n); n++)
      static_cast<float*>(a.y)[n] = row_scale(w, n);
  });
}

inline void sweep(const SweepArguments& a) {
  if (a.format == Format::nvfp4) return Sweep<true>(a).run();
  Sweep<false>(a).run();
}

inline void round_rows(const RoundArguments& a) {
  if (a.format == Format::nvfp4) return RoundRows<true>(a).run();
  RoundRows<false>(a).run();
}

}  // namespace nunchaku_py::cpu::NUNCHAKU_PY_ISA
