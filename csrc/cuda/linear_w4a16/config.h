// Which kernel for which problem.
#pragma once

namespace nunchaku_py::cuda {

// Few rows read the weight once and decode it for each four of them; the tensor cores, for which it is decoded once for
// 64, win from some rows on (an estimate). Those of sm_75 multiply no bf16; channels and ranks come in whole fragments.
constexpr bool has_many_rows(int m, int n, int r, bool is_bf16, int capability) {
  constexpr int MOST_FEW = 16;
  return m > MOST_FEW && n % 16 == 0 && r % 16 == 0 && (capability >= 80 || !is_bf16);
}

}  // namespace nunchaku_py::cuda
