// The main loop for Hopper: one thread asks TMA for stages, two warpgroups multiply them by wgmma. Stages are a ring;
// two barriers of each say when it is full, and when it is empty again. They go on from tile to tile, so that the first
// stages of the next one come while the last one is finished.
//
// Each block of the cluster asks for its own rows of x and for half of the weight's, which go to both. So a stage is
// filled by both blocks, and empty when the warps of both have read it.
//
// The ranks of the branch are stages too: 64 ranks of `up` take the place of 128 inputs of the weight.
#pragma once
#include "cuda/common/ldmatrix.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/linear_w4a8/group_sm90.cuh"

namespace nunchaku_py::cuda {

constexpr int STAGE_INPUTS = BOX_BYTES, STAGE_RANKS = BOX_BYTES / 2;

template <class Tile>
struct alignas(1024) StageSm90 {
  uint8_t x[Tile::BM * BOX_BYTES], w[Tile::BN * BOX_BYTES];
};

template <class Tile>
struct RingSm90 {
  StageSm90<Tile> stages[Tile::STAGES];
  Barrier full[Tile::STAGES], empty[Tile::STAGES];
};

// Where in the ring a thread is.
template <class Tile>
struct Turning {
  int stage = 0, parity = 0;

  DEVICE void next() {
    if (++stage == Tile::STAGES) stage = 0, parity ^= 1;
  }
};

// By one thread of the block; the blocks of the cluster meet after it.
template <class Tile>
DEVICE void make_barriers(RingSm90<Tile>& ring) {
  for (int i = 0; i < Tile::STAGES; ++i) {
    mbarrier_init(ring.full + i, 1);
    mbarrier_init(ring.empty + i, Tile::CLUSTER * Tile::MULTIPLYING * 4);  // warps
  }
  mbarrier_init_done();
}

// ---- copying --------------------------------------------------------------------------------------------------------
// This block's half of a stage's rows of the weight, or of up; `jump`: see Operands.
template <class Tile>
DEVICE void share_half(StageSm90<Tile>& stage, const TensorMap* map, int byte, int n0, int jump, Barrier* full) {
  constexpr int HALF = Tile::BN / 2;
  const int rank = cluster_rank();
  tma_load_multicast(stage.w + rank * HALF * BOX_BYTES, map, byte, n0 + rank * (HALF + jump), full, 0b11);
}

template <class Tile, class T, class Ending>
DEVICE void copy_item(RingSm90<Tile>& ring, Turning<Tile>& turn, const PartSm90<T, Ending>& part, const Item& item) {
  const int jump = part.linear.in.jump;
  for (int byte = 0; byte < part.linear.in.steps * STEP_BYTES; byte += BOX_BYTES, turn.next()) {
    Barrier* const full = ring.full + turn.stage;
    mbarrier_wait(ring.empty + turn.stage, turn.parity ^ 1);
    mbarrier_expect(full, (Tile::BM + Tile::BN) * BOX_BYTES);
    tma_load(ring.stages[turn.stage].x, &part.x, byte, item.m0, full);
    share_half(ring.stages[turn.stage], &part.w, byte, item.n0, jump, full);
  }
  for (int byte = 0; byte < part.linear.branch.R * 2; byte += BOX_BYTES, turn.next()) {
    Barrier* const full = ring.full + turn.stage;
    mbarrier_wait(ring.empty + turn.stage, turn.parity ^ 1);
    mbarrier_expect(full, Tile::BN * BOX_BYTES);
    share_half(ring.stages[turn.stage], &part.up, byte, item.n0, jump, full);
  }
}

// ---- multiplying ----------------------------------------------------------------------------------------------------
// This warp has read a stage: it says so to both blocks, which fill it.
template <class Tile>
DEVICE void release(RingSm90<Tile>& ring, int stage) {
  if (const int lane = threadIdx.x % 32; lane < Tile::CLUSTER) mbarrier_arrive_at(ring.empty + stage, lane);
}

// sums = x·wᵀ; `group`: which 64 of the block's rows.
template <class Tile>
DEVICE void multiply(int (&sums)[Tile::SUMS], RingSm90<Tile>& ring, Turning<Tile>& turn, int steps, int group) {
  int last = 0;
#pragma unroll 1
  for (int step = 0; step < steps; step += STAGE_INPUTS / STEP_BYTES, turn.next()) {
    mbarrier_wait(ring.full + turn.stage, turn.parity);
    const uint64_t x = tile_descriptor(ring.stages[turn.stage].x + group * 64 * BOX_BYTES);
    const uint64_t w = tile_descriptor(ring.stages[turn.stage].w);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < STAGE_INPUTS / STEP_BYTES; ++i) wgmma_m64k32_s8<Tile::BN>(sums, x + 2 * i, w + 2 * i, true);
    wgmma_commit();
    wgmma_wait<1>();  // one stage is multiplied while the next is asked for
    if (step > 0) release(ring, last);
    last = turn.stage;
  }
  wgmma_wait<0>(sums);
  release(ring, last);
}

// What a thread has of eight channels.
template <int SUMS>
DEVICE float (&fragment(float (&y)[SUMS], int n))[4] {
  return *reinterpret_cast<float (*)[4]>(y + n * 4);
}

// y += h·upᵀ, h rounded to the type of up; `row`: the first of the thread's two. By mma: wgmma would want y in
// registers of its own beside the integers that y comes from, and there are not so many.
template <class Tile, class T>
DEVICE void add_low_rank(float (&y)[Tile::SUMS], RingSm90<Tile>& ring, Turning<Tile>& turn, const LowRank<T>& in,
                         int row, int M) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int rank0 = 0; rank0 < in.R; rank0 += STAGE_RANKS, turn.next()) {
    const uint8_t* const up = ring.stages[turn.stage].w + (lane / 16 * 8 + lane % 8) * BOX_BYTES;
    mbarrier_wait(ring.full + turn.stage, turn.parity);
#pragma unroll 1
    for (int rank = rank0; rank < in.R && rank < rank0 + STAGE_RANKS; rank += 16) {
      uint32_t h[4];
      load_hidden(h, in, row, rank + lane % 4 * 2, M);
      const int chunk = (rank - rank0) / 8 + lane / 8 % 2;  // of eight ranks, where the swizzle has put it
#pragma unroll
      for (int n = 0; n < Tile::BN / 8; n += 2) {
        uint32_t w[4];  // of two fragments
        ldmatrix_x4(w, up + n * 8 * BOX_BYTES + (chunk ^ lane % 8) * 16);
        mma_m16n8k16<T>(fragment(y, n), h, {w[0], w[1]});
        mma_m16n8k16<T>(fragment(y, n + 1), h, {w[2], w[3]});
      }
    }
    __syncwarp();  // all lanes have read what two of them release
    release(ring, turn.stage);
  }
}

}  // namespace nunchaku_py::cuda
