// Runs CUDA kernels that a C++ compiler compiled for the host: every thread is a fiber, barriers and warp instructions
// are where fibers meet, and every instruction that csrc/cuda/common wraps has a model that does what the PTX ISA says.
//
// Reported: accesses out of bounds, misaligned, to read-only buffers; shared memory read before it is written, or while
// a cp.async or TMA fills it; accesses to shared memory that no barrier of any kind orders, or no fence_async for wgmma
// and TMA; mbarriers and wgmma used against their rules; blocks that end while others of their cluster still do
// something there; threads that do not arrive, with what they wait at.
// Exact to the bit: integers, ldmatrix, shuffles, conversions, IEEE arithmetic. Not defined to the bit by PTX, so to be
// tested both ways (Options::truncate): sums of float mma, approximate functions. Tests run in both thread orders, too,
// and with work that goes on by itself done late and early (Options::eager).
// Not seen: the text of the asm; races on global memory; registers used before they are set; which scope a barrier has;
// how many registers there are; speed.
#pragma once
#include "barriers.h"
#include "collective.h"
#include "models.h"
#include "numbers.h"
#include "tma.h"
#include "wgmma.h"

// CUDA's own names, after every standard header, as these use some of them for themselves.
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (simt::self->index)
#define blockIdx (simt::self->block_index)
#define blockDim (simt::self->block->dim)
#define gridDim (simt::self->block->grid)
#define rsqrtf(x) (simt::approximate(1 / std::sqrt(double(x)), 0x1p-22))

inline void __syncthreads() {
  simt::self->block->barrier(*simt::self);
}
inline void __syncwarp(unsigned mask = ~0u) {
  simt::sync_warp(mask);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const simt::Segment segment(width);
  return simt::shuffle("__shfl_xor_sync", mask, value, segment.clamp(segment.own ^ (lane_mask & 31)));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const simt::Segment segment(width);
  return simt::shuffle("__shfl_down_sync", mask, value, segment.clamp(segment.own + int(delta & 31)));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const simt::Segment segment(width);
  return simt::shuffle("__shfl_sync", mask, value, segment.first + (lane & (width - 1)));
}
