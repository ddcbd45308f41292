// norm_modulate_quantize is quantize_act of norm(x)·norm_weight·(1 + scale) + shift, rounded once to the type of x.
//
// Each row is read twice, the second time from the cache: first for its mean and variance. A thread takes those of the
// sixteen values that it has at a time about their own mean, so that a large mean costs no digits, and all are merged
// in a fixed order.
#pragma once
#include "cuda/quantize_act/kernel.cuh"

namespace nunchaku_py::cuda {

struct Moments {
  float count = 0, mean = 0, m2 = 0;  // m2: the sum of squared distances from the mean
};

DEVICE Moments merged(const Moments& a, const Moments& b) {
  const float count = a.count + b.count;
  if (count == 0) return a;
  const float apart = b.mean - a.mean, part = b.count / count;
  return {count, fmaf(apart, part, a.mean), a.m2 + b.m2 + apart * apart * a.count * part};
}

DEVICE Moments moments_of(const float (&x)[OWN]) {
  float sum = 0, m2 = 0;
#pragma unroll
  for (const float v : x) sum += v;
  const float mean = sum / OWN;
#pragma unroll
  for (const float v : x) m2 = fmaf(v - mean, v - mean, m2);
  return {float(OWN), mean, m2};
}

// RMS: RMSNorm, else LayerNorm.
template <class T, bool RMS>
struct Normed {
  const T *norm_weight, *scale, *shift;  // (K); (B, K), of the sample that a row belongs to
  int rows_of_sample;
  float eps;
  float mean[2], by[2];  // of rows g and g + 8: the kernel's own

  template <int WARPS>
  DEVICE void prepare(float* shared, const QuantizeParams<T>& p, int row) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Moments found[2];
    for (int group = warp; group < p.out.K / GROUP; group += WARPS) {
      uint32_t pairs[2][OWN / 2];
      load_rows(pairs, p, row, group * GROUP + lane % 4 * OWN);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float x[OWN];
        widen<T>(x, pairs[i]);
        found[i] = merged(found[i], moments_of(x));
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Moments whole = of_all<WARPS>(shared + i * WARPS * 24, of_row(found[i]), lane, warp);
      const float square = whole.m2 / whole.count;
      mean[i] = RMS ? 0 : whole.mean;
      by[i] = rsqrtf((RMS ? fmaf(whole.mean, whole.mean, square) : square) + eps);
    }
    __syncthreads();  // shared is used again
  }

  DEVICE void finish(uint32_t (&pairs)[2][OWN / 2], const QuantizeParams<T>& p, int row, int column) const {
    uint32_t weights[OWN / 2];
    load_pairs(weights, norm_weight + column, true);
    float weight[OWN];
    widen<T>(weight, weights);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (row + i * 8 < p.out.M)
        modulate(pairs[i], weight, i, (row + i * 8) / rows_of_sample * size_t(p.out.K) + column);
  }

 private:
  DEVICE static Moments of_row(Moments found) {  // of the four threads of a row
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      const Moments other = {shfl_xor(found.count, lanes), shfl_xor(found.mean, lanes), shfl_xor(found.m2, lanes)};
      const bool first = (threadIdx.x & lanes) == 0;  // both merge in the same order
      found = first ? merged(found, other) : merged(other, found);
    }
    return found;
  }

  template <int WARPS>
  DEVICE static Moments of_all(float* shared, const Moments& found, int lane, int warp) {
    const int g = lane / 4;
    if (lane % 4 == 0) {
      float* const to = shared + (warp * 8 + g) * 3;
      sts(to, found.count), sts(to + 1, found.mean), sts(to + 2, found.m2);
    }
    __syncthreads();
    Moments whole;
    for (int w = 0; w < WARPS; ++w) {
      const float* const from = shared + (w * 8 + g) * 3;
      whole = merged(whole, {lds<float>(from), lds<float>(from + 1), lds<float>(from + 2)});
    }
    return whole;
  }

  DEVICE void modulate(uint32_t (&pairs)[OWN / 2], const float (&weight)[OWN], int i, size_t of_sample) const {
    uint32_t scales[OWN / 2], shifts[OWN / 2];
    load_pairs(scales, scale + of_sample, true), load_pairs(shifts, shift + of_sample, true);
    float x[OWN], grow[OWN], add[OWN];
    widen<T>(x, pairs), widen<T>(grow, scales), widen<T>(add, shifts);
#pragma unroll
    for (int j = 0; j < OWN; ++j) x[j] = (x[j] - mean[i]) * by[i] * weight[j] * (1 + grow[j]) + add[j];
#pragma unroll
    for (int j = 0; j < OWN / 2; ++j) pairs[j] = cvt_16bitx2<T>(x[j * 2], x[j * 2 + 1]);
  }
};

}  // namespace nunchaku_py::cuda
