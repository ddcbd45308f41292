// Kernels as device code, one of each shape: what tests/test_cuda_compile.py compiles for the targets they are made for.
#include "cuda/linear_w4a4/next_act.cuh"
#include "cuda/norm_modulate_quantize/source.cuh"

namespace nunchaku_py::cuda {

using Large = Tile<128, 128, 64, 64, 2>;
#define LINEAR(T, is_unsigned, ...) \
  template __global__ void linear_w4a4_kernel<Large, is_unsigned, T, __VA_ARGS__>(Linear<T>, __VA_ARGS__);
LINEAR(bf16, false, Store<bf16>)
LINEAR(f16, true, GateResidual<f16>)
LINEAR(bf16, false, QkvRope<bf16>)
#define NEXT(T, ...) \
  template __global__ void linear_w4a4_next_kernel<Large, false, T, __VA_ARGS__>(Linear<T>, NextAct<T>, __VA_ARGS__, \
                                                                                 int);
NEXT(bf16, Plain<Large>)
NEXT(f16, Gated<Large>)
#define QUANTIZE(T, ...) \
  template __global__ void quantize_act_kernel<T, 32, 4, __VA_ARGS__>(QuantizeParams<T>, __VA_ARGS__);
QUANTIZE(bf16, AsItIs<bf16>)
QUANTIZE(f16, Normed<f16, true>)

}  // namespace nunchaku_py::cuda
