// TMA: one thread asks for a box of a matrix in global memory, which comes to shared memory by itself and counts as so
// many bytes at an mbarrier. Boxes are of rows of 128 bytes, and start in shared memory at a multiple of 1024; of row r
// there, the 16 bytes number c lie at place c ^ r % 8 (128-byte swizzle): what wgmma reads, see wgmma.cuh. What lies
// outside the matrix is zero, and counts as bytes too.
#pragma once
#include <string>

#include "cuda/common/mbarrier.cuh"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace nunchaku_py::cuda {

#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = simt::TensorMap;
#endif

constexpr int BOX_BYTES = 128;

// The rules of cuTensorMapEncodeTiled for such a map.
inline void check_tensor_map(const void* global, int rows, int64_t row_bytes, int box_rows, int box_bytes) {
  const auto expect = [](bool is_right, const std::string& what) {
    if (!is_right) throw std::runtime_error("a tensor map needs " + what);
  };
  expect(reinterpret_cast<uintptr_t>(global) % 16 == 0, "an address that is a multiple of 16");
  expect(rows > 0, "at least one row, not " + std::to_string(rows));
  expect(row_bytes > 0 && row_bytes % 16 == 0 && row_bytes < int64_t(1) << 32,
         "rows of a multiple of 16 bytes, fewer than 2^32, not of " + std::to_string(row_bytes));
  expect(box_rows > 0 && box_rows <= 256, "boxes of 1 to 256 rows, not of " + std::to_string(box_rows));
  expect(box_bytes == BOX_BYTES, "boxes of 128 bytes in a row, not of " + std::to_string(box_bytes));
}

// A map of a matrix of bytes, row after row, that is read in boxes. Kernels take it in a parameter that is
// `const __grid_constant__`, as TMA wants its address.
#ifndef __CUDACC__
inline TensorMap tensor_map(const void* global, int rows, int64_t row_bytes, int box_rows, int box_bytes) {
  check_tensor_map(global, rows, row_bytes, box_rows, box_bytes);
  return {global, rows, row_bytes, box_rows, box_bytes};
}
#else
// Of the driver, asked of the runtime, as only the runtime is linked.
inline decltype(&cuTensorMapEncodeTiled) encode_tiled() {
  constexpr unsigned SINCE = 12000;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  check_launch(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, SINCE, cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess || !function)
    throw std::runtime_error("the NVIDIA driver is too old to make tensor maps");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

inline TensorMap tensor_map(const void* global, int rows, int64_t row_bytes, int box_rows, int box_bytes) {
  check_tensor_map(global, rows, row_bytes, box_rows, box_bytes);
  static const auto encode = encode_tiled();
  const cuuint64_t sizes[] = {cuuint64_t(row_bytes), cuuint64_t(rows)}, pitch[] = {cuuint64_t(row_bytes)};
  const cuuint32_t box[] = {cuuint32_t(box_bytes), cuuint32_t(box_rows)}, steps[] = {1, 1};
  TensorMap map;
  const CUresult error =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(global), sizes, pitch, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS)
    throw std::runtime_error("the NVIDIA driver refuses to make a tensor map: error " + std::to_string(int(error)));
  return map;
}
#endif

// The box whose first row begins at that byte of that row.
template <int SM = TARGET>
DEVICE void tma_load(void* shared, const TensorMap* map, int byte, int row, Barrier* barrier) {
  static_assert(SM >= 90, "tma_load needs sm_90");
#ifndef __CUDACC__
  simt::tma_load(shared, *map, byte, row, barrier);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared_address(shared)),
      "l"(map), "r"(byte), "r"(row), "r"(shared_address(barrier))
      : "memory");
#endif
}

// To the same place in every block of the cluster whose rank is a bit of `blocks`, and counted at the barrier of the
// same place there.
template <int SM = TARGET>
DEVICE void tma_load_multicast(void* shared, const TensorMap* map, int byte, int row, Barrier* barrier,
                               uint16_t blocks) {
  static_assert(SM >= 90, "tma_load_multicast needs sm_90");
#ifndef __CUDACC__
  simt::tma_load_multicast(shared, *map, byte, row, barrier, blocks);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(byte), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
#endif
}

// The map itself, so that the first load does not wait for it.
template <int SM = TARGET>
DEVICE void tma_prefetch(const TensorMap* map) {
  static_assert(SM >= 90, "tma_prefetch needs sm_90");
#ifdef __CUDACC__
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

}  // namespace nunchaku_py::cuda
