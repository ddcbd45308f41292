// What becomes of y before it is written. An epilogue sees four neighbouring columns of a row, as floats, bias added.
// All threads of a warp call together, also for rows and columns beyond the end: these are not `inside`.
#pragma once
#include "cuda/common/convert.cuh"
#include "cuda/common/memory.cuh"
#include "cuda/common/warp.cuh"

namespace nunchaku_py::cuda {

struct Cell {
  int row, column;
  bool inside;
};

template <class T>
DEVICE void store_four(T* to, const float (&y)[4]) {
  stg(to, uint2{cvt_16bitx2<T>(y[0], y[1]), cvt_16bitx2<T>(y[2], y[3])});
}

template <class T>
DEVICE void from_16bit(float (&to)[4], uint2 two) {
  float low[2], high[2];
  cvt_f32x2<T>(low, two.x), cvt_f32x2<T>(high, two.y);
  to[0] = low[0], to[1] = low[1], to[2] = high[0], to[3] = high[1];
}

template <class T>
DEVICE void load_four(float (&to)[4], const T* from) {
  from_16bit<T>(to, ldg<uint2>(from));
}

// y in the type of up.
template <class T>
struct Store {
  T* y;
  int N;
  DEVICE void operator()(float (&y4)[4], Cell at) const {
    if (at.inside) store_four(y + size_t(at.row) * N + at.column, y4);
  }
};

// residual + gate·y, gate (B, N) of the sample that the row belongs to.
template <class T>
struct GateResidual {
  T* y;
  const T *gate, *residual;
  int N, rows_of_sample;
  DEVICE void operator()(float (&y4)[4], Cell at) const {
    if (!at.inside) return;
    float by[4], to[4];
    load_four(by, gate + size_t(at.row / rows_of_sample) * N + at.column);
    load_four(to, residual + size_t(at.row) * N + at.column);
    for (int i = 0; i < 4; ++i) y4[i] = to[i] + by[i] * y4[i];  // rounded twice, as the reference rounds it
    store_four(y + size_t(at.row) * N + at.column, y4);
  }
};

// q, k, v (M, N/3) of y = cat(q, k, v): RMSNorm of q's and k's heads, then pairs of row m turned by rotary[m % tokens].
template <class T>
struct QkvRope {
  T* parts[3];
  const float *norms[2], *rotary;  // q's and k's weights (D); (tokens, D/2, 2), cos and sin
  int N, head_dim, tokens;         // head_dim: a power of two, from 8 to the columns of a tile
  float eps;

  DEVICE void operator()(float (&y4)[4], Cell at) const {
    const int width = N / 3, part = at.column / width, column = at.column % width;
    float squares = 0;
    for (int i = 0; i < 4; ++i) squares = fmaf(y4[i], y4[i], squares);
    for (int lanes = 1; lanes < head_dim / 4; lanes *= 2) squares += shfl_xor(squares, lanes);
    if (!at.inside) return;
    if (part < 2) turn(y4, at.row, part, column % head_dim, rsqrtf(squares / head_dim + eps));
    T* const to = part == 0 ? parts[0] : part == 1 ? parts[1] : parts[2];  // indexed, they would go to local memory
    store_four(to + size_t(at.row) * width + column, y4);
  }

  DEVICE void turn(float (&y4)[4], int row, int part, int place, float by) const {
    const float4 weight = ldg<float4>((part == 0 ? norms[0] : norms[1]) + place);
    const float4 angles = ldg<float4>(rotary + size_t(row % tokens) * head_dim + place);  // cos, sin, cos, sin
    const float a = y4[0] * by * weight.x, b = y4[1] * by * weight.y, c = y4[2] * by * weight.z,
                d = y4[3] * by * weight.w;
    y4[0] = a * angles.x - b * angles.y, y4[1] = a * angles.y + b * angles.x;
    y4[2] = c * angles.z - d * angles.w, y4[3] = c * angles.w + d * angles.z;
  }
};

}  // namespace nunchaku_py::cuda
