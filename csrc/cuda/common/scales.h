// How the scales of INT4 groups lie on the device: (G, rows padded to 64), the rows of a block in the order in which
// the threads of a warp want them, so that each reads its own in one piece.
#pragma once
#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

namespace nunchaku_py::cuda {

constexpr int GROUP = 64;        // inputs that share a scale
constexpr int SCALE_BLOCK = 64;  // rows that are permuted together

HOST_DEVICE constexpr int scale_rows(int rows) {
  return (rows + SCALE_BLOCK - 1) / SCALE_BLOCK * SCALE_BLOCK;
}

// Where in its group's row a token's scale lies: "(M m:4 i:2 g:8) -> M g m i". Those of output channels lie by
// "(N n:8 t:4 e:2) -> N t n e"; they are put there when a weight is prepared, not by kernels.
HOST_DEVICE constexpr int scale_of_row(int row) {
  return row / 64 * 64 + row % 8 * 8 + row % 64 / 16 * 2 + row % 16 / 8;
}

}  // namespace nunchaku_py::cuda
