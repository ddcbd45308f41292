// A small W4A4 GEMM, and mistakes to plant in it, for test_planted_bugs.py:
//   y = (qx·sx)·(qw·sw)ᵀ + h·upᵀ + bias, in bf16, INT4 codes with a scale per row and group of 64 along K.
// Tiles of 64 x 64, a group in each stage of the pipeline, four warps of 16 rows each.
#include "call.h"
#include "cuda/common/convert.cuh"
#include "cuda/common/cp_async.cuh"
#include "cuda/common/ldmatrix.cuh"
#include "cuda/common/mma.cuh"

using namespace nunchaku_py::cuda;

namespace {

enum class Bug {
  none,
  no_barrier,
  waits_for_one_group_too_few,
  swapped_registers,
  no_bound_on_stores,
  wrong_scale_index,
  refills_a_stage_in_use,
  no_swizzle,
  low_rank_from_the_wrong_row,
};
const char* const bug_names[] = {"none",
                                 "no_barrier",
                                 "waits_for_one_group_too_few",
                                 "swapped_registers",
                                 "no_bound_on_stores",
                                 "wrong_scale_index",
                                 "refills_a_stage_in_use",
                                 "no_swizzle",
                                 "low_rank_from_the_wrong_row"};

template <class Scale>
struct Params {
  const uint8_t *qx, *qw;     // (M, K/2), (N, K/2): even k in the low nibble
  const Scale *sx, *sw;       // (K/64, pitch), (K/64, N)
  const bf16 *h, *up, *bias;  // (M, R), (N, R), (N)
  bf16* y;                    // (M, N)
  int M, N, K, R, pitch;      // N and K multiples of 64, R of 16, pitch of 8
  Bug bug;
};

constexpr int TILE = 64, STAGES = 3, THREADS = 128, ROW_BYTES = TILE / 2;

template <class Scale>
struct Stage {
  alignas(16) uint8_t x[TILE * ROW_BYTES], w[TILE * ROW_BYTES];
  Scale sx[TILE], sw[TILE];
};

// A row is two chunks of 16 bytes; exchanged in every other four rows, ldmatrix meets no bank twice.
DEVICE int chunk_offset(int row, int chunk, Bug bug) {
  return row * ROW_BYTES + (bug == Bug::no_swizzle ? chunk : chunk ^ (row / 4 % 2)) * 16;
}

template <class Scale>
DEVICE void load_stage(Stage<Scale>& stage, const Params<Scale>& p, int m0, int n0, int group) {
  const int t = threadIdx.x, row = t / 2, chunk = t % 2, offset = chunk_offset(row, chunk, p.bug);
  const size_t pitch = p.K / 2, column = size_t(group) * ROW_BYTES + chunk * 16;
  const bool inside = m0 + row < p.M;  // what lies beyond is zero
  cp_async16(stage.x + offset, inside ? p.qx + (m0 + row) * pitch + column : p.qx, inside ? 16 : 0);
  cp_async16(stage.w + offset, p.qw + (n0 + row) * pitch + column);
  if (t < 8) {
    const int m = m0 + t * 8;
    const bool some = m < p.pitch;
    cp_async16(stage.sx + t * 8, some ? p.sx + size_t(group) * p.pitch + m : p.sx, some ? 16 : 0);
  } else if (t < 16) {
    cp_async16(stage.sw + (t - 8) * 8, p.sw + size_t(group) * p.N + n0 + (t - 8) * 8);
  }
}

template <class Scale>
DEVICE void multiply_stage(float (&acc)[8][4], const Stage<Scale>& stage, int warp, int lane, Bug bug) {
  const int g = lane / 4, t = lane % 4;
  uint32_t a[4];
  ldmatrix_x4(a, stage.x + chunk_offset(warp * 16 + lane % 16, lane / 16, bug));
  if (bug == Bug::swapped_registers) std::swap(a[1], a[2]);
  float sx[2];
  for (int i = 0; i < 2; ++i) sx[i] = cvt_f32(lds<Scale>(stage.sx + warp * 16 + g + i * 8));
  for (int n = 0; n < 8; n += 2) {
    uint32_t b[4];  // two tiles of eight columns, two registers each
    ldmatrix_x4(b, stage.w + chunk_offset(n * 8 + lane / 16 * 8 + lane % 8, lane / 8 % 2, bug));
    for (int j = 0; j < 2; ++j) {
      int sum[4] = {};
      mma_m16n8k64_s4(sum, a, {b[j * 2], b[j * 2 + 1]});
      for (int i = 0; i < 4; ++i) {
        const int column = (n + j) * 8 + (bug == Bug::wrong_scale_index ? t : t * 2) + i % 2;
        const float scale = sx[i / 2] * cvt_f32(lds<Scale>(stage.sw + column));
        acc[n + j][i] = fmaf(cvt_f32(sum[i]), scale, acc[n + j][i]);
      }
    }
  }
}

template <class Scale>
DEVICE void add_low_rank(float (&acc)[8][4], const Params<Scale>& p, int row, int n0, int lane) {
  const int g = lane / 4, t = lane % 4;
  for (int r = 0; r < p.R; r += 16) {
    uint32_t a[4];
    for (int i = 0; i < 4; ++i) {
      const int m = row + (p.bug == Bug::low_rank_from_the_wrong_row ? i / 2 : i % 2) * 8;
      a[i] = m < p.M ? ldg<uint32_t>(p.h + size_t(m) * p.R + r + t * 2 + i / 2 * 8) : 0;
    }
    for (int n = 0; n < 8; ++n) {
      const bf16* const up = p.up + size_t(n0 + n * 8 + g) * p.R + r + t * 2;
      mma_m16n8k16_bf16(acc[n], a, {ldg<uint32_t>(up), ldg<uint32_t>(up + 8)});
    }
  }
}

template <class Scale>
DEVICE void store(const float (&acc)[8][4], const Params<Scale>& p, int row, int n0, int t) {
  for (int n = 0; n < 8; ++n) {
    const int column = n0 + n * 8 + t * 2;
    float bias[2];
    cvt_f32x2<bf16>(bias, ldg<uint32_t>(p.bias + column));
    for (int i = 0; i < 2; ++i)
      if (row + i * 8 < p.M || p.bug == Bug::no_bound_on_stores)
        stg(p.y + size_t(row + i * 8) * p.N + column, cvt_bf16x2(acc[n][i * 2] + bias[0], acc[n][i * 2 + 1] + bias[1]));
  }
}

template <class Scale>
__global__ void __launch_bounds__(THREADS) gemm_kernel(Params<Scale> p) {
  SHARED_DYNAMIC(shared);
  auto* const stages = reinterpret_cast<Stage<Scale>*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int m0 = blockIdx.y * TILE, n0 = blockIdx.x * TILE, groups = p.K / TILE;
  float acc[8][4] = {};
  for (int k = 0; k < STAGES - 1; ++k) {
    if (k < groups) load_stage(stages[k], p, m0, n0, k);
    cp_async_commit();
  }
  for (int k = 0; k < groups; ++k) {
    if (p.bug == Bug::waits_for_one_group_too_few)
      cp_async_wait<STAGES - 1>();
    else
      cp_async_wait<STAGES - 2>();
    if (p.bug != Bug::no_barrier) __syncthreads();  // stage k is there for all, and nobody reads stage k − 1 any more
    const int next = k + STAGES - 1, refilled = (next + (p.bug == Bug::refills_a_stage_in_use)) % STAGES;
    if (next < groups) load_stage(stages[refilled], p, m0, n0, next);
    cp_async_commit();
    multiply_stage(acc, stages[k % STAGES], warp, lane, p.bug);
  }
  const int row = m0 + warp * 16 + lane / 4;  // and row + 8
  add_low_rank(acc, p, row, n0, lane);
  store(acc, p, row, n0, lane % 4);
}

Bug bug_called(const std::string& name) {
  for (int i = 0; i < int(std::size(bug_names)); ++i)
    if (name == bug_names[i]) return Bug(i);
  throw simt::Error("no bug is called " + name);
}

using simt::Array, simt::Call, simt::Input, simt::Output;

template <class Scale>
const char* run_gemm(Call& call, const char* bug, Array qx, Array qw, Array sx, Array sw, Array h, Array up, Array bias,
                     Array y, int M, int N, int K, int R, int pitch) {
  return simt::run(call, [&] {
    const Input<uint8_t> in_qx("qx", qx), in_qw("qw", qw);
    const Input<Scale> in_sx("sx", sx), in_sw("sw", sw);
    const Input<bf16> in_h("h", h), in_up("up", up), in_bias("bias", bias);
    const Output<bf16> out_y("y", y);
    const Params<Scale> p{in_qx.data(),
                          in_qw.data(),
                          in_sx.data(),
                          in_sw.data(),
                          in_h.data(),
                          in_up.data(),
                          in_bias.data(),
                          out_y.data(),
                          M,
                          N,
                          K,
                          R,
                          pitch,
                          bug_called(bug)};
    launch(gemm_kernel<Scale>, dim3(N / TILE, (M + TILE - 1) / TILE), THREADS, sizeof(Stage<Scale>) * STAGES, nullptr,
           p);
  });
}

}  // namespace

SIMT_EXPORT const char* gemm_f16(Call& call, const char* bug, Array qx, Array qw, Array sx, Array sw, Array h, Array up,
                                 Array bias, Array y, int M, int N, int K, int R, int pitch) {
  return run_gemm<f16>(call, bug, qx, qw, sx, sw, h, up, bias, y, M, N, K, R, pitch);
}
SIMT_EXPORT const char* gemm_bf16(Call& call, const char* bug, Array qx, Array qw, Array sx, Array sw, Array h,
                                  Array up, Array bias, Array y, int M, int N, int K, int R, int pitch) {
  return run_gemm<bf16>(call, bug, qx, qw, sx, sw, h, up, bias, y, M, N, K, R, pitch);
}
