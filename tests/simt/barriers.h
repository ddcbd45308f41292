// Hopper's barriers: mbarriers, named barriers, and how warpgroups share registers out.
#pragma once
#include <cstdint>
#include <cstring>

#include "collective.h"

namespace simt {

inline std::ptrdiff_t offset_of(const Block& block, const void* p) {
  return static_cast<const unsigned char*>(p) - block.shared();
}

// ---- mbarriers ------------------------------------------------------------------------------------------------------
// What is in shared memory where an mbarrier is: a mark, and its number.
constexpr std::uint64_t kMbarrierMark = 0x6d62617272000000;

// The mbarrier at this place in shared memory of the block, which `me` is about to use.
inline Mbarrier& mbarrier_at(Block& block, std::ptrdiff_t offset, const Thread& me) {
  if (offset % 8) fail(Fault::alignment, me, "uses an mbarrier at shared+", offset);
  const unsigned char* const p = block.shared() + offset;
  block.memory().check_written(me, me.block->now(me), p, 8);
  std::uint64_t state;
  std::memcpy(&state, p, 8);
  const std::uint64_t number = state ^ kMbarrierMark;
  if (number >= block.async.mbarriers.size())
    fail(Fault::misuse, me, "uses an mbarrier at shared+", offset,
         ", where none was initialised, or it was overwritten");
  return block.async.mbarriers[number];
}

inline void mbarrier_init(void* p, int arrivals) {
  Thread& me = *self;
  Block& block = *me.block;
  Clocks* const clocks = block.cluster.clocks();
  if (arrivals < 1 || arrivals >= 1 << 20)
    fail(Fault::misuse, me, "initialises an mbarrier for ", arrivals, " arrivals");
  touch_shared(p, 8, Access::write);
  std::vector<Mbarrier>& all = block.async.mbarriers;
  if (all.size() == Clocks::kMbarriers)
    fail(Fault::misuse, me, "initialises more than ", all.size(), " mbarriers, which is all that the model has");
  const std::uint64_t state = kMbarrierMark ^ all.size();
  std::memcpy(p, &state, 8);
  Mbarrier& barrier = all.emplace_back();
  barrier.at = p, barrier.initialiser = me.id, barrier.arrivals = barrier.pending = arrivals;
  if (clocks) barrier.known = barrier.done = clocks->empty();
}

// For what this thread initialised.
inline void mbarrier_init_done() {
  for (Mbarrier& barrier : self->block->async.mbarriers) barrier.visible |= barrier.initialiser == self->id;
}

inline void complete_if_done(Block& block, Mbarrier& barrier, const Thread& by) {
  if (barrier.pending) return;
  if (barrier.bytes < 0)
    fail(Fault::misuse, by, "sends ", -barrier.bytes, " bytes more than the mbarrier at shared+",
         offset_of(block, barrier.at), " is told to expect in phase ", barrier.phase);
  if (barrier.bytes) return;
  ++barrier.phase, barrier.pending = barrier.arrivals;
  if (Clocks* const clocks = block.clocks) {
    clocks->join(barrier.done.data(), barrier.known.data());
    const unsigned number = &barrier - block.async.mbarriers.data();
    barrier.done[clocks->async_member(block.rank, Clocks::mbarrier(number))] = barrier.phase;
  }
  for (const Thread* const one : barrier.waiting) block.resume(*one);
  barrier.waiting.clear();
}

inline void arrive(Block& block, std::ptrdiff_t offset, int bytes) {
  constexpr int kMostBytes = (1 << 20) - 1;
  Thread& me = *self;
  Mbarrier& barrier = mbarrier_at(block, offset, me);
  if (barrier.pending == 0)
    fail(Fault::misuse, me, "arrives at the mbarrier at shared+", offset, ", where all ", barrier.arrivals,
         " have arrived, in phase ", barrier.phase, ": ", barrier.bytes, " bytes are to come");
  barrier.bytes += bytes, --barrier.pending;
  if (bytes < 0 || barrier.bytes > kMostBytes)
    fail(Fault::misuse, me, "expects ", bytes, " bytes at the mbarrier at shared+", offset);
  if (Clocks* const clocks = block.clocks) clocks->join(barrier.known.data(), me.block->release(me));
  complete_if_done(block, barrier, me);
}

inline void mbarrier_expect(void* barrier, int bytes) {
  arrive(*self->block, offset_of(*self->block, barrier), bytes);
}
inline void mbarrier_arrive(void* barrier) {
  arrive(*self->block, offset_of(*self->block, barrier), 0);
}

// Block `rank` of the cluster, to which this thread does something.
inline Block& block_of_cluster(int rank) {
  const auto& blocks = self->block->cluster.blocks;
  if (rank < 0 || rank >= static_cast<int>(blocks.size()))
    fail(Fault::bounds, *self, "turns to block ", rank, " of a cluster of ", blocks.size());
  Block& block = *blocks[rank];
  if (!block.alive) fail(Fault::lifetime, *self, "turns to block ", rank, " of its cluster, which has ended");
  return block;
}

inline void mbarrier_arrive_at(void* barrier, int rank) {
  Thread& me = *self;
  Block& block = block_of_cluster(rank);
  const std::ptrdiff_t offset = offset_of(*me.block, barrier);
  if (&block != me.block) {
    if (!mbarrier_at(block, offset, me).visible)
      fail(Fault::misuse, me, "arrives at an mbarrier of block ", rank, " without a mbarrier_init_done there");
    if (block.clocks) block.async.visits[block.clocks->member(me.rank, me.id)] = me.block->warp(me).tick;
  }
  arrive(block, offset, 0);
}

inline void mbarrier_wait(void* p, int parity) {
  Thread& me = *self;
  Block& block = *me.block;
  if (parity != 0 && parity != 1) fail(Fault::misuse, me, "waits for a phase of parity ", parity);
  const std::ptrdiff_t offset = offset_of(block, p);
  Mbarrier& barrier = mbarrier_at(block, offset, me);
  while (static_cast<int>(barrier.phase % 2) == parity) {
    me.at = parity ? "an mbarrier, for parity 1," : "an mbarrier, for parity 0,";
    me.place = &barrier - block.async.mbarriers.data() + 1;
    barrier.waiting.push_back(&me);
    block.wait(me);
  }
  if (block.clocks) block.clocks->join(block.row(me), barrier.done.data());
}

inline void fence_async() {
  Thread& me = *self;
  Block& block = *me.block;
  mbarrier_init_done();
  if (!block.cluster.clocks()) return;
  block.release(me);
  block.clocks->fence(me.rank, me.id);
}

// ---- named barriers -------------------------------------------------------------------------------------------------
constexpr const char* kNamedBarriers[] = {
    "",                 "named barrier 1",  "named barrier 2",  "named barrier 3",
    "named barrier 4",  "named barrier 5",  "named barrier 6",  "named barrier 7",
    "named barrier 8",  "named barrier 9",  "named barrier 10", "named barrier 11",
    "named barrier 12", "named barrier 13", "named barrier 14", "named barrier 15"};

inline void named_barrier(int id, unsigned threads) {
  Thread& me = *self;
  Block& block = *me.block;
  if (id < 1 || id > 15) fail(Fault::misuse, me, "is at named barrier ", id, "; there are 1 to 15");
  Clocks* const clocks = block.cluster.clocks();
  NamedBarrier& barrier = block.async.named[id];
  if (barrier.waiting.empty()) barrier.threads = threads;
  if (barrier.threads != threads)
    fail(Fault::divergence, me, "is at named barrier ", id, " for ", threads, " threads, where others are for ",
         barrier.threads);
  barrier.waiting.push_back(&me);
  me.at = kNamedBarriers[id], me.place = 0, me.instruction = &barrier;
  if (barrier.waiting.size() < threads) return block.wait(me);
  for (const Thread* const one : barrier.waiting)
    for (unsigned lane = one->id & ~31u; lane < block.threads.size() && lane < (one->id | 31u) + 1; ++lane)
      if (block.threads[lane].instruction != &barrier)
        fail(Fault::divergence, me, "is at ", me.at, " with only some lanes of the warp of thread ", one->id);
  if (clocks) block.meet(barrier.waiting);
  for (Thread* const one : barrier.waiting) ++block.warp(*one).tick, one->instruction = nullptr, block.resume(*one);
  barrier.waiting.clear();
}

// ---- clusters -------------------------------------------------------------------------------------------------------
inline int cluster_rank() {
  return self->rank;
}
inline int cluster_size() {
  return self->block->cluster.blocks.size();
}
inline void cluster_sync() {
  self->block->cluster.barrier(*self);
}

// ---- registers ------------------------------------------------------------------------------------------------------
// Of whole warps; those of a warpgroup need not come together. How many a kernel begins with only the assembler knows:
// as many as fit, but no more than it asks for anywhere.
inline void set_registers(unsigned count, bool more) {
  Thread& me = *self;
  Block& block = *me.block;
  RegisterPool& pool = block.async.pool;
  Warp& warp = block.warp(me);
  const char* const name = more ? "more_registers" : "fewer_registers";
  collective_of_all(name, 0, [&](auto) {
    if (more && warp.registers == pool.at_launch) warp.registers = std::min(warp.registers, count);
    if (more ? count < warp.registers : count > warp.registers)
      fail(Fault::misuse, me, "has ", warp.registers, " registers, and asks for ", more ? "more: " : "fewer: ", count);
  });
  if (me.id % 32 == 0) {
    while (more && (count - warp.registers) * 32 > pool.free) {
      me.at = "more_registers, which are not there", me.place = 0;
      pool.waiting.push_back(&me);
      block.wait(me);
    }
    pool.free -= (count - warp.registers) * 32, warp.registers = count;
    for (const Thread* const one : pool.waiting) block.resume(*one);
    pool.waiting.clear();
  }
  collective_of_all(name, 0, [](auto) {});
}

}  // namespace simt
