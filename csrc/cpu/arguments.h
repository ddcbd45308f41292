// What the CPU ops are called with: raw pointers and sizes. Shapes and meanings are those of nunchaku_py/ops/.
#pragma once
#include <cstdint>

namespace nunchaku_py::cpu {

enum class Type : int { f32, bf16, f16 };
enum class Format : int { none, int4, uint4, nvfp4, int8 };
enum class Norm : int { none, layer, rms };
enum class Activation : int { none, gelu_tanh, gelu, silu };
enum class Ending : int { store, activate, glu, gate_residual };

struct Array {  // a matrix or vector of floating point numbers, contiguous
  const void* data = nullptr;
  Type type = Type::f32;
};

// Rows m and columns k of an activation to quantize: out = Q((norm(x) + shift)·inv_smooth), h = norm(x)·downᵀ.
struct QuantizeArguments {
  Array x;
  std::int64_t m = 0, k = 0;
  const float* inv_smooth = nullptr;
  const void* down = nullptr;  // (r, k), of x's type
  std::int64_t r = 0;
  Format format = Format::int8;
  std::int64_t group = 0;
  float shift = 0;
  void* qx = nullptr;
  void* sx = nullptr;  // int8: fp32 (m); nvfp4: e4m3 (m, groups); int4, uint4: of x's type (m, groups); none: nothing
  float* h = nullptr;  // (m, r)
  int threads = 1;

  Norm norm = Norm::none;  // from here on norm_modulate_quantize only
  float eps = 0;
  Array norm_weight;            // (k)
  Array scale, modulate_shift;  // (samples, k)
  std::int64_t samples = 0;
};

struct LinearArguments {
  std::int64_t m = 0, n = 0, k = 0, r = 0;
  const void* qx = nullptr;  // as quantize_act gives it
  Type x = Type::f32;        // its type where act is none
  const void* sx = nullptr;
  Format act = Format::int8;
  Type act_scales = Type::f32;
  const std::uint8_t* qw = nullptr;  // (n, ceil(k/2)) nibbles; int8: (n, k)
  const void* sw = nullptr;          // (n, groups): nvfp4 e4m3, else of type weight_scales; int8: fp32 (n)
  Format weight = Format::int4;
  Type weight_scales = Type::f32;
  std::int64_t group = 64;
  const float* row_scales = nullptr;  // (n): what row_scales gives, if the caller has kept it
  Array aux;                          // nvfp4: channel_scale (n) fp32; uint4: zeros (n, groups)
  const float* h = nullptr;           // (m, r)
  Array up, bias;                     // (n, r), (n)
  Type out = Type::f32;
  void* y = nullptr;  // (m, n), glu: (m, n/2)
  int threads = 1;

  Ending ending = Ending::store;
  Activation activation = Activation::none;
  bool gate_first = false;
  Array gate;  // gate_residual: (samples, n)
  std::int64_t samples = 1;
  const void* residual = nullptr;  // (m, n) of `out`'s type
};

constexpr std::int64_t sweep_columns = 128;  // the most that one call of `sweep` rounds

// GPTQ's column loop over `columns` (k, n): column j of the weight is a row here. nunchaku_py/methods/gptq.py.
struct SweepArguments {
  std::int64_t n = 0, k = 0;
  float* columns = nullptr;  // to be rounded in place; rows `stride` numbers apart
  std::int64_t stride = 0;
  float* errors = nullptr;  // (k, n): what is written
  std::int64_t error_stride = 0;
  const float* upper = nullptr;  // (k, k)
  std::int64_t upper_stride = 0;
  const float* step = nullptr;          // (groups, n)
  const float* inverse = nullptr;       // (groups, n): 0 where the step is
  const std::int64_t* group = nullptr;  // (k): of each column
  Format format = Format::int4;
  int threads = 1;
};

// Plain rounding of R = Ŵ − up·low, Ŵ = weight·smooth, and what it costs. nunchaku_py/methods/error.py.
struct RoundArguments {
  std::int64_t n = 0, k = 0;
  float* r = nullptr;  // (n, k): R, in its place Ŵ − Q
  Array weight;        // (n, k)
  const float* smooth = nullptr;
  const float* signal = nullptr;    // (k)
  const float* rounding = nullptr;  // (k)
  Format format = Format::int4;
  std::int64_t group = 64;  // a multiple of 16
  Type scales = Type::bf16;
  double* cost = nullptr;  // (n)
  int threads = 1;
};

}  // namespace nunchaku_py::cpu
