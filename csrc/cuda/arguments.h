// What the CUDA ops are called with: raw pointers, sizes, and where to run. Shapes and meanings are those of
// nunchaku_py/ops/; scales lie as common/scales.h says. Functions return when the work is on the stream: they neither
// wait nor allocate.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

namespace nunchaku_py::cuda {

enum class Type : int { bf16 = 1, f16 = 2 };
// Of an activation; the weight is int4, nvfp4 or int8 likewise.
enum class Codes : int { int4 = 1, uint4 = 2, nvfp4 = 3, int8 = 4 };
enum class Norm : int { none, layer, rms };
enum class Activation : int { none, gelu_tanh, gelu, silu };

struct Where {
  int device = 0;
  void* stream = nullptr;
};

// x (m, k), quantized: out = Q((norm(x) + shift)·inv_smooth), h = norm(x)·downᵀ.
struct QuantizeArguments {
  Where where;
  Type type = Type::bf16;  // of x, down, sx and what modulates
  int m = 0, k = 0, r = 0;
  const void* x = nullptr;
  const float* inv_smooth = nullptr;
  const void* down = nullptr;
  Codes codes = Codes::int4;
  float shift = 0;
  std::uint8_t* qx = nullptr;
  void* sx = nullptr;
  float* h = nullptr;
  const float* tops = nullptr;  // (m) largest magnitudes of what is quantized to INT8, where they are known

  Norm norm = Norm::none;  // from here on norm_modulate_quantize only
  float eps = 0;
  const void *norm_weight = nullptr, *scale = nullptr, *modulate_shift = nullptr;  // (k), (samples, k)
  int samples = 1;
};

struct LinearArguments {
  Where where;
  Type type = Type::bf16;  // of sx, sw, up and what comes out
  int m = 0, n = 0, k = 0, r = 0;
  Codes codes = Codes::int4;
  const std::uint8_t *qx = nullptr, *qw = nullptr;
  const void *sx = nullptr, *sw = nullptr;  // of groups; INT8: (m) and (n) floats
  const float* channel_scales = nullptr;    // (n), NVFP4 only
  const float* h = nullptr;
  const void* up = nullptr;
  const float* bias = nullptr;
};

// A 4-bit weight (n, k) as INT8: what linear_w4a8 multiplies.
struct ExpandArguments {
  Where where;
  Type type = Type::bf16;  // of INT4 scales
  Codes codes = Codes::int4;
  int n = 0, k = 0, group = 0;
  const std::uint8_t* qw = nullptr;
  const void* sw = nullptr;                                      // in rows
  const float *row_scales = nullptr, *channel_scales = nullptr;  // of the result; NVFP4's
  void* w8 = nullptr;
};

struct StoreArguments {
  void* y = nullptr;
};

struct GateResidualArguments {
  const void *gate = nullptr, *residual = nullptr;  // (samples, n), (m, n)
  int samples = 1;
  void* y = nullptr;
};

struct QkvRopeArguments {
  const float *q_norm = nullptr, *k_norm = nullptr, *rotary = nullptr;  // (head_dim), (tokens, head_dim/2, 2)
  int head_dim = 0, tokens = 0;
  float eps = 0;
  void *q = nullptr, *k = nullptr, *v = nullptr;
};

// The next linear's input, `width` columns, and the memory in which blocks leave their parts of h. For INT8: z, which
// is quantized when all of its rows are there, and its rows' largest magnitudes, zero before.
struct NextArguments {
  Activation activation = Activation::none;
  bool gate_first = false;
  Codes codes = Codes::int4;
  float shift = 0;
  const float* inv_smooth = nullptr;
  const void* down = nullptr;
  int r = 0;
  std::uint8_t* qx = nullptr;
  void* sx = nullptr;
  float* h = nullptr;
  float* parts = nullptr;  // (gelu_parts or glu_parts, m, r); not for INT8
  void* z = nullptr;       // (m, width); for INT8 only, as `tops`
  float* tops = nullptr;   // (m)
};

// linear_w4a16: all in rows.
struct DecodedArguments {
  Where where;
  Type type = Type::bf16;  // of x, scales, zeros, up and y
  int m = 0, n = 0, k = 0, r = 0, group = 0;
  const void* x = nullptr;
  const std::uint8_t* qw = nullptr;
  const void *scales = nullptr, *zeros = nullptr;  // zeros: null where codes are signed
  const float* h = nullptr;
  const void* up = nullptr;
  const float* bias = nullptr;
  void* y = nullptr;
};

void quantize_act(const QuantizeArguments& a);
void norm_modulate_quantize(const QuantizeArguments& a);

void linear_w4a16(const DecodedArguments& a);
void expand_int8(const ExpandArguments& a);

// Linears in one launch, of which none needs the others: of one device, type and kind of codes.
template <class To>
using Calls = std::vector<std::pair<LinearArguments, To>>;

void linear_w4a4(const Calls<StoreArguments>& calls);
void linear_w4a4_gate_residual(const Calls<GateResidualArguments>& calls);
void linear_w4a4_qkv_rope(const Calls<QkvRopeArguments>& calls);
void linear_w4a4_gelu_quantize(const Calls<NextArguments>& calls);
void linear_w4a4_glu_quantize(const Calls<NextArguments>& calls);
void linear_w4a8(const Calls<StoreArguments>& calls);
void linear_w4a8_gate_residual(const Calls<GateResidualArguments>& calls);
void linear_w4a8_qkv_rope(const Calls<QkvRopeArguments>& calls);
void linear_w4a8_gelu_quantize(const Calls<NextArguments>& calls);
void linear_w4a8_glu_quantize(const Calls<NextArguments>& calls);

struct Problem {
  int m, n;
};

// How many parts of h each call of linear_w4a4_gelu_quantize and …_glu_quantize leaves.
std::vector<int> gelu_parts(int device, const std::vector<Problem>& problems);
std::vector<int> glu_parts(int device, const std::vector<Problem>& problems);

}  // namespace nunchaku_py::cuda
