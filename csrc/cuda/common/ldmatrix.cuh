// ldmatrix: N matrices of 8 rows of 16 bytes from shared memory. Lane l gives the address of row l % 8 of matrix l / 8,
// and gets of each matrix the 4 bytes at l % 4 of row l / 4: for any element width what mma wants there. TRANSPOSED:
// the 16-bit elements 2·(l % 4) and the next of column l / 4.
#pragma once
#include "cuda/common/memory.cuh"

namespace nunchaku_py::cuda {

template <bool TRANSPOSED = false>
DEVICE void ldmatrix_x1(uint32_t (&d)[1], const void* row) {
#ifndef __CUDACC__
  simt::ldmatrix<1, TRANSPOSED>("ldmatrix.x1", d, row);
#else
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(d[0])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(d[0])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

template <bool TRANSPOSED = false>
DEVICE void ldmatrix_x2(uint32_t (&d)[2], const void* row) {
#ifndef __CUDACC__
  simt::ldmatrix<2, TRANSPOSED>("ldmatrix.x2", d, row);
#else
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(d[0]), "=r"(d[1])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(d[0]), "=r"(d[1])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

template <bool TRANSPOSED = false>
DEVICE void ldmatrix_x4(uint32_t (&d)[4], const void* row) {
#ifndef __CUDACC__
  simt::ldmatrix<4, TRANSPOSED>("ldmatrix.x4", d, row);
#else
  if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

}  // namespace nunchaku_py::cuda
