// A small GEMM in Hopper's manner, and mistakes to plant in it: y = a·bᵀ in integers, a (M, K) and b (N, K).
// A producer warpgroup fills stages by TMA, two consumer warpgroups multiply 64 rows each by wgmma and store by way of
// shared memory. Blocks of a cluster have the same columns: each loads its part of b and sends it to all.
#pragma once
#include "hopper.cuh"

namespace nunchaku_py::cuda {

#define PIPELINE_BUGS(X)                \
  X(none)                               \
  X(reads_before_full)                  \
  X(refills_before_empty)               \
  X(empty_of_own_block_only)            \
  X(gives_back_the_stage_in_use)         \
  X(wrong_parity_of_full)               \
  X(wrong_parity_of_empty)              \
  X(expects_too_many_bytes)             \
  X(expects_too_few_bytes)              \
  X(one_arrival_too_many)               \
  X(one_arrival_too_few)                \
  X(leaves_the_cluster_early)           \
  X(no_mbarrier_init_done)              \
  X(no_cluster_sync_after_init)         \
  X(no_wgmma_fence)                     \
  X(no_wgmma_wait)                      \
  X(touches_sums_of_wgmma)              \
  X(next_k_without_shift)               \
  X(no_named_barrier)                   \
  X(staging_over_a_stage)               \
  X(named_barrier_of_too_many)          \
  X(more_registers_than_there_are)

enum class PipelineBug {
#define ONE(name) name,
  PIPELINE_BUGS(ONE)
#undef ONE
};

constexpr int PIPELINE_STAGES = 3, PIPELINE_COLUMNS = 64, PIPELINE_ROWS = 128, PIPELINE_THREADS = 3 * WARPGROUP;

struct PipelineStage {
  unsigned char a[PIPELINE_ROWS * BOX_BYTES], b[PIPELINE_COLUMNS * BOX_BYTES];
};
struct PipelineShared {
  PipelineStage stages[PIPELINE_STAGES];
  int staging[2][64 * PIPELINE_COLUMNS];  // of each consumer
  Barrier full[PIPELINE_STAGES], empty[PIPELINE_STAGES];
};

struct PipelineParams {
  TensorMap a, b;
  int* y;
  int m, n, k;
  PipelineBug bug;

#ifdef __CUDACC__
  DEVICE static constexpr bool has(PipelineBug) { return false; }  // device code is that of the right kernel
#else
  bool has(PipelineBug one) const { return bug == one; }
#endif
};

// Which stage, and how often it has been gone round.
struct Turn {
  int stage = 0, round = 0;
  DEVICE void next() {
    if (++stage == PIPELINE_STAGES) stage = 0, ++round;
  }
};

DEVICE int pipeline_blocks_of_k(const PipelineParams& p) {
  return (p.k + BOX_BYTES - 1) / BOX_BYTES;
}

template <class Params>
DEVICE void pipeline_init(PipelineShared& s, const Params& p) {
  const int arrivals = 2 * (p.has(PipelineBug::empty_of_own_block_only) ? 1 : cluster_size());
  if (this_thread() == 0) {
    for (int i = 0; i < PIPELINE_STAGES; ++i) {
      mbarrier_init(&s.full[i], 1);
      mbarrier_init(&s.empty[i], arrivals + p.has(PipelineBug::one_arrival_too_few));
    }
    if (!p.has(PipelineBug::no_mbarrier_init_done)) mbarrier_init_done();
  }
  if (p.has(PipelineBug::no_cluster_sync_after_init))
    __syncthreads();
  else
    cluster_sync();
}

// One thread.
template <class Params>
DEVICE void produce(PipelineShared& s, const Params& p, int row, int column, Turn& turn) {
  const int size = cluster_size(), part = PIPELINE_COLUMNS / size;
  for (int k = 0; k < pipeline_blocks_of_k(p); ++k, turn.next()) {
    PipelineStage& stage = s.stages[turn.stage];
    Barrier* const full = &s.full[turn.stage];
    const int parity = (turn.round + 1) % 2 ^ p.has(PipelineBug::wrong_parity_of_empty);
    if (!p.has(PipelineBug::refills_before_empty)) mbarrier_wait(&s.empty[turn.stage], parity);
    int bytes = sizeof(PipelineStage);
    bytes += 16 * (p.has(PipelineBug::expects_too_many_bytes) - p.has(PipelineBug::expects_too_few_bytes));
    mbarrier_expect(full, bytes);
    tma_load(stage.a, &p.a, k * BOX_BYTES, row, full);
    unsigned char* const b = stage.b + cluster_rank() * part * BOX_BYTES;
    if (size == 1)
      tma_load(b, &p.b, k * BOX_BYTES, column, full);
    else
      tma_load_multicast(b, &p.b, k * BOX_BYTES, column + cluster_rank() * part, full, uint16_t((1 << size) - 1));
  }
}

template <class Params>
DEVICE void consumers_done(PipelineShared& s, const Params& p, int stage, int thread) {
  if (p.has(PipelineBug::empty_of_own_block_only)) {
    if (thread == 0) mbarrier_arrive(&s.empty[stage]);
  } else if (thread < cluster_size()) {
    mbarrier_arrive_at(&s.empty[stage], thread);
  }
  if (p.has(PipelineBug::one_arrival_too_many) && thread == 0) mbarrier_arrive(&s.empty[stage]);
}

// The sums of one tile. A stage is given back when the wgmma of the next one have begun.
template <class Params>
DEVICE void consume(int (&d)[PIPELINE_COLUMNS / 2], PipelineShared& s, const Params& p, int group, Turn& turn) {
  const int thread = this_thread() % WARPGROUP;
  int previous = 0;
  for (int k = 0; k < pipeline_blocks_of_k(p); ++k, turn.next()) {
    PipelineStage& stage = s.stages[turn.stage];
    const int parity = turn.round % 2 ^ p.has(PipelineBug::wrong_parity_of_full);
    if (!p.has(PipelineBug::reads_before_full)) mbarrier_wait(&s.full[turn.stage], parity);
    if (!p.has(PipelineBug::no_wgmma_fence)) wgmma_fence();
    const uint64_t a = tile_descriptor(stage.a + group * 64 * BOX_BYTES), b = tile_descriptor(stage.b);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int step = i * (p.has(PipelineBug::next_k_without_shift) ? 32 : 2);
      wgmma_m64k32_s8<PIPELINE_COLUMNS>(d, a + step, b + step, k || i);
    }
    wgmma_commit();
    if (p.has(PipelineBug::touches_sums_of_wgmma)) d[0] = 0;
    if (!p.has(PipelineBug::no_wgmma_wait)) wgmma_wait<1>();
    if (p.has(PipelineBug::gives_back_the_stage_in_use))
      consumers_done(s, p, turn.stage, thread);
    else if (k)
      consumers_done(s, p, previous, thread);
    previous = turn.stage;
  }
  if (!p.has(PipelineBug::no_wgmma_wait)) wgmma_wait<0>(d);
  if (!p.has(PipelineBug::gives_back_the_stage_in_use)) consumers_done(s, p, previous, thread);
}

template <class Params>
DEVICE void pipeline_store(const int (&d)[PIPELINE_COLUMNS / 2], PipelineShared& s, const Params& p, int row,
                           int column, int group) {
  const int thread = this_thread() % WARPGROUP, warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  int* const staging = p.has(PipelineBug::staging_over_a_stage)
                           ? reinterpret_cast<int*>(s.stages[group].a)
                           : s.staging[group];
  const auto meet = [&] {
    if (p.has(PipelineBug::named_barrier_of_too_many))
      named_barrier<3 * WARPGROUP>(1);
    else if (!p.has(PipelineBug::no_named_barrier))
      named_barrier<WARPGROUP>(1 + group);
  };
#pragma unroll
  for (int r = 0; r < PIPELINE_COLUMNS / 2; ++r)
    sts(staging + (warp * 16 + g + r / 2 % 2 * 8) * PIPELINE_COLUMNS + r / 4 * 8 + t * 2 + r % 2, d[r]);
  meet();
  for (int i = thread; i < 64 * PIPELINE_COLUMNS; i += WARPGROUP) {
    const int m = row + group * 64 + i / PIPELINE_COLUMNS, n = column + i % PIPELINE_COLUMNS;
    if (m < p.m && n < p.n) stg(p.y + size_t(m) * p.n + n, lds<int>(staging + i));
  }
  meet();  // before the next tile comes there
}

// Blocks of a cluster take tiles below each other; clusters go through the matrix in turn.
template <class Params>
__global__ void __launch_bounds__(PIPELINE_THREADS, 1) pipeline_kernel(const __grid_constant__ Params p) {
  if constexpr (HOPPER) {
    SHARED_DYNAMIC(shared);
    PipelineShared& s = *reinterpret_cast<PipelineShared*>(shared);
    const int size = cluster_size(), cluster = this_block() / size, clusters = gridDim.x / size;
    const int tall = PIPELINE_ROWS * size, rows = (p.m + tall - 1) / tall;
    const int tiles = rows * ((p.n + PIPELINE_COLUMNS - 1) / PIPELINE_COLUMNS);
    pipeline_init(s, p);
    Turn turn;
    const int group = this_thread() / WARPGROUP - 1;
    const auto each_tile = [&](auto body) {
      for (int tile = cluster; tile < tiles; tile += clusters)
        body(tile % rows * tall + cluster_rank() * PIPELINE_ROWS, tile / rows * PIPELINE_COLUMNS);
    };
    if (group < 0) {  // loops of their own, or the assembler gives both kinds of warps the registers of the larger
      fewer_registers<40>();
      if (this_thread() == 0) each_tile([&](int row, int column) { produce(s, p, row, column, turn); });
    } else {
      if (p.has(PipelineBug::more_registers_than_there_are))
        more_registers<240>();
      else
        more_registers<232>();
      each_tile([&](int row, int column) {
        int d[PIPELINE_COLUMNS / 2];
        consume(d, s, p, group, turn);
        pipeline_store(d, s, p, row, column, group);
      });
    }
    if (!p.has(PipelineBug::leaves_the_cluster_early)) cluster_sync();
  }
}

struct PipelineProblem {
  const void *a, *b;
  int* y;
  int m, n, k;
};

inline void launch_pipeline(const PipelineProblem& problem, int cluster, PipelineBug bug, stream_t stream) {
  const auto [a, b, y, m, n, k] = problem;
  const PipelineParams p{tensor_map(a, m, k, PIPELINE_ROWS, BOX_BYTES),
                         tensor_map(b, n, k, PIPELINE_COLUMNS / cluster, BOX_BYTES), y, m, n, k, bug};
  const size_t bytes = sizeof(PipelineShared);
  launch_cluster(cluster, pipeline_kernel<PipelineParams>, 2 * cluster, PIPELINE_THREADS, bytes, stream, p);
}

inline PipelineBug bug_called(const std::string& name) {
#define ONE(one) \
  if (name == #one) return PipelineBug::one;
  PIPELINE_BUGS(ONE)
#undef ONE
  throw std::invalid_argument("no bug is called " + name);
}

}  // namespace nunchaku_py::cuda
