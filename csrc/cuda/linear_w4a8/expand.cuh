// A 4-bit weight as INT8 with one scale per output channel, which formats.fold_int8 has found: w8 = round(w/s_ch), the
// very integers. It is done in every call where the weight stays in 4 bits: 1.5 bytes of traffic a weight.
//
// A thread takes 32 neighbours. Weights that share a scale have few values: each is divided once, and looked up.
#pragma once
#include "cuda/common/convert.cuh"
#include "cuda/common/memory.cuh"

namespace nunchaku_py::cuda {

constexpr int EXPANDED = 32, EXPANDING_THREADS = 256;

struct ExpandParams {
  const uint8_t* qw;  // (N, K/2)
  const void* sw;     // (N, ceil(K/group)): 16 bit, or NVFP4's e4m3
  const float* row_scales;
  const float* channel_scales;  // NVFP4's, (N)
  int8_t* w8;                   // (N, K)
  int N, K, group;              // K a multiple of 32
};

// INT8 of the sixteen codes that share a scale: those with the highest bit clear, and set.
struct Table {
  uint32_t clear[2], set[2];
};

// Two's complement: the codes that have the bit set are -8 to -1.
template <class T>
struct Int4Weight {
  using Scale = T;
  static constexpr int SHARING = EXPANDED;  // neighbours that share a scale at least
  DEVICE static float value(int code) { return float(code < 8 ? code : code - 16); }
};

struct Nvfp4Weight {
  using Scale = e4m3;
  static constexpr int SHARING = 16;
  DEVICE static float value(int code) {
    const int magnitude = code & 7;
    const float twice = magnitude < 4 ? magnitude : (2 + magnitude % 2) << (magnitude / 2 - 1);
    return code < 8 ? twice * .5f : twice * -.5f;
  }
};

DEVICE uint32_t folded(float w, float row_scale) {
  const float v = fminf(fmaxf(w / row_scale, -127.f), 127.f);
  return row_scale > 0 ? __builtin_bit_cast(uint32_t, v + WHOLE) & 255 : 0;
}

template <class Weight>
DEVICE Table table_of(float scale, float channel_scale, float row_scale) {
  Table table = {};
#pragma unroll
  for (int code = 0; code < 16; ++code) {
    const uint32_t w8 = folded(Weight::value(code) * scale * channel_scale, row_scale);
    (code < 8 ? table.clear : table.set)[code / 4 % 2] |= w8 << code % 4 * 8;
  }
  return table;
}

// Four codes, in the lower half of `codes`.
DEVICE uint32_t looked_up(const Table& table, uint32_t codes) {
  return prmt(prmt(table.clear[0], table.clear[1], codes), prmt(table.set[0], table.set[1], codes),
              0x3210 | (codes & 0x8888) >> 1);
}

template <class Weight>
__global__ void __launch_bounds__(EXPANDING_THREADS) expand_kernel(ExpandParams p) {
  const int pieces = p.K / EXPANDED;
  const int64_t i = int64_t(blockIdx.x) * EXPANDING_THREADS + threadIdx.x;
  if (i >= int64_t(p.N) * pieces) return;
  const int n = int(i / pieces), k = int(i % pieces) * EXPANDED;
  const uint4 found = ldg<uint4>(p.qw + i * (EXPANDED / 2));
  const uint32_t codes[4] = {found.x, found.y, found.z, found.w};
  const float row_scale = ldg<float>(p.row_scales + n);
  const float channel_scale = p.channel_scales ? ldg<float>(p.channel_scales + n) : 1.f;
  const auto* const scales =
      static_cast<const typename Weight::Scale*>(p.sw) + size_t(n) * ((p.K + p.group - 1) / p.group);
  uint32_t w8[8];
#pragma unroll
  for (int j = 0; j < EXPANDED; j += Weight::SHARING) {
    const float scale = cvt_f32(ldg<typename Weight::Scale>(scales + (k + j) / p.group));
    const Table table = table_of<Weight>(scale, channel_scale, row_scale);
#pragma unroll
    for (int four = j / 4; four < (j + Weight::SHARING) / 4; ++four)
      w8[four] = looked_up(table, codes[four / 2] >> four % 2 * 16);
  }
  stg(p.w8 + i * EXPANDED, uint4{w8[0], w8[1], w8[2], w8[3]});
  stg(p.w8 + i * EXPANDED + 16, uint4{w8[4], w8[5], w8[6], w8[7]});
}

}  // namespace nunchaku_py::cuda
