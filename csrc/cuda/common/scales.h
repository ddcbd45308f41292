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

// "(M m:4 i:2 g:8) -> M g m i": of rows that are tokens.
HOST_DEVICE constexpr int scale_of_row(int row) {
  return row / 64 * 64 + row % 8 * 8 + row % 64 / 16 * 2 + row % 16 / 8;
}

// "(N n:8 t:4 e:2) -> N t n e": of rows that are output channels.
HOST_DEVICE constexpr int scale_of_channel(int row) {
  return row / 64 * 64 + row % 8 / 2 * 16 + row % 64 / 8 * 2 + row % 2;
}

}  // namespace nunchaku_py::cuda
