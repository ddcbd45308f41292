// The matrix instructions, by the fragment layouts of the PTX ISA (warp-level matrix instructions).
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "collective.h"
#include "numbers.h"

namespace simt {

// ---- mma.sync -------------------------------------------------------------------------------------------------------
// A and B as matrices, B by columns. One description serves every shape: see csrc/cuda/common/mma.cuh.
template <class Element, int M, int K>
struct Factors {
  Element a[M][K], b[8][K];

  template <int BITS, int NA, int NB, class DecodeA, class DecodeB>
  void put(int lane, const std::uint32_t (&ra)[NA], const std::uint32_t (&rb)[NB], DecodeA decode_a, DecodeB decode_b) {
    constexpr int E = 32 / BITS;
    for (int e = 0; e < E; ++e) {
      const int g = lane / 4, k = lane % 4 * E + e;
      for (int r = 0; r < NA; ++r) a[g + 8 * (r % 2)][k + 4 * E * (r / 2)] = decode_a(ra[r] >> e * BITS);
      for (int r = 0; r < NB; ++r) b[g][k + 4 * E * r] = decode_b(rb[r] >> e * BITS);
    }
  }
  template <class Acc, int NC>
  void multiply(int lane, Acc (&c)[NC]) const {
    using Sum = std::conditional_t<std::is_same_v<Acc, int>, int, double>;
    for (int r = 0; r < NC; ++r) {
      const Element *const row = a[lane / 4 + 8 * (r / 2)], *const column = b[lane % 4 * 2 + r % 2];
      Sum sum = 0;
      for (int k = 0; k < K; ++k) sum += static_cast<Sum>(row[k]) * static_cast<Sum>(column[k]);
      c[r] = rounded_sum(c[r], sum);
    }
  }
};

template <class Acc, int NC, int NA, int NB>
struct Fragments {  // of one lane
  Acc (&c)[NC];
  const std::uint32_t (&a)[NA], (&b)[NB];
  std::uint32_t scale_a = 0, scale_b = 0;
};

template <int M, int K, int BITS, class Acc, int NC, int NA, int NB, class DecodeA, class DecodeB>
void mma(const char* name, Acc (&c)[NC], const std::uint32_t (&a)[NA], const std::uint32_t (&b)[NB], DecodeA decode_a,
         DecodeB decode_b) {
  static_assert(NA * 32 * 32 == M * K * BITS && NB * 32 * 32 == 8 * K * BITS && NC * 32 == M * 8);
  using Lane = Fragments<Acc, NC, NA, NB>;
  collective_of_all(name, Lane{c, a, b}, [&](Lane* const* lanes) {
    Factors<decltype(decode_a(0)), M, K> factors;
    for (int i = 0; i < 32; ++i) factors.template put<BITS>(i, lanes[i]->a, lanes[i]->b, decode_a, decode_b);
    for (int i = 0; i < 32; ++i) factors.multiply(i, lanes[i]->c);
  });
}

template <int M, int K, int BITS, int NC, int NA, int NB, class DecodeA, class DecodeB>
void mma_from(const char* name, int (&d)[NC], const std::uint32_t (&a)[NA], const std::uint32_t (&b)[NB],
              DecodeA decode_a, DecodeB decode_b, int start) {
  std::fill(d, d + NC, start);
  mma<M, K, BITS>(name, d, a, b, decode_a, decode_b);
}

// scale_vec::4X: byte j of a scale register is for columns 16·j to 16·j + 15. pair and lane: the thread selectors, of a
// quad's pairs of lanes for A, of its lanes for B.
inline void mma_nvf4(const char* name, float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                     std::uint32_t scale_a, std::uint32_t scale_b, int pair, int lane) {
  using Lane = Fragments<float, 4, 4, 2>;
  collective_of_all(name, Lane{c, a, b, scale_a, scale_b}, [=](Lane* const* lanes) {
    Factors<float, 16, 64> factors;
    for (int i = 0; i < 32; ++i) factors.put<4>(i, lanes[i]->a, lanes[i]->b, e2m1_value, e2m1_value);
    for (int k = 0; k < 64; ++k) {
      const auto scale = [k](std::uint32_t scales) { return ue4m3_value(scales >> k / 16 * 8); };
      for (int i = 0; i < 16; ++i) factors.a[i][k] *= scale(lanes[i % 8 * 4 + pair * 2 + i / 8]->scale_a);
      for (int j = 0; j < 8; ++j) factors.b[j][k] *= scale(lanes[j * 4 + lane]->scale_b);
    }
    for (int i = 0; i < 32; ++i) factors.multiply(i, lanes[i]->c);
  });
}

// ---- ldmatrix -------------------------------------------------------------------------------------------------------
// Eight rows take one phase, or more where rows lie in the same banks; counted since they were set to zero.
inline std::atomic<std::uint64_t> ldmatrix_phases, ldmatrix_matrices;

class BankCount {
 public:
  void add(const void* row) { worst = std::max(worst, ++rows_[reinterpret_cast<std::uintptr_t>(row) / 16 % 8]); }
  int worst = 0;

 private:
  int rows_[8] = {};  // by bank, 16 bytes each
};

template <int N, bool TRANSPOSED>
void ldmatrix(const char* name, std::uint32_t (&d)[N], const void* address) {
  struct Lane {
    std::uint32_t* d;
    const void* row;
  };
  collective_of_all(name, Lane{d, address}, [](Lane* const* lanes) {
    Block& block = *self->block;
    for (int m = 0; m < N; ++m) {
      std::uint16_t tile[8][8];
      BankCount banks;
      for (int r = 0; r < 8; ++r) {
        const void* const row = lanes[m * 8 + r]->row;
        block.touch(block.threads[(self->id & ~31u) + m * 8 + r], row, 16, Access::read, true);
        std::memcpy(tile[r], row, 16);
        banks.add(row);
      }
      ++ldmatrix_matrices, ldmatrix_phases += banks.worst;
      for (int l = 0; l < 32; ++l) {
        const int i = l / 4, j = l % 4 * 2;
        const std::uint32_t low = TRANSPOSED ? tile[j][i] : tile[i][j],
                            high = TRANSPOSED ? tile[j + 1][i] : tile[i][j + 1];
        lanes[l]->d[m] = low | high << 16;
      }
    }
  });
}

}  // namespace simt
