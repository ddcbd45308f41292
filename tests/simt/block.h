// A block of threads, run by one host thread: a fiber runs until it has to wait, then the next that can.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "async.h"
#include "buffer.h"
#include "shadow.h"
#include "thread.h"

namespace simt {

class Cluster;

struct Warp {
  std::uint32_t lanes = 0, ready = 0, waiting = 0;  // lanes that there are, that can run, that wait at an instruction
  unsigned tick = 1;                                // counts what may order its lanes' accesses: __syncwarp and more
  unsigned synced = 1;                              // its tick at the last __syncthreads
  unsigned registers = 0;                           // of a thread
};

class Block {
 public:
  Block(Cluster& cluster_, unsigned rank_, dim3 grid_size, dim3 size, std::size_t shared_bytes)
      : cluster(cluster_),
        rank(rank_),
        grid(grid_size),
        dim(size),
        threads(size.x * size.y * size.z),
        warps_((threads.size() + 31) / 32),
        stacks_(threads.size()),
        memory_(shared_bytes) {}

  void reset(uint3 block_index, void (*entry)()) {
    index = block_index, alive = threads.size(), clocks = nullptr;
    epoch_ = 1, arrived_ = 0;
    cursor_ = options.reverse ? warps_.size() - 1 : 0;
    memory_.forget();
    async = Async(threads.size());
    warps_.assign(warps_.size(), {});
    for (unsigned i = 0; i < threads.size(); ++i) {
      Thread& thread = threads[i];
      thread.block = this, thread.id = i, thread.rank = rank, thread.block_index = index;
      thread.index = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
      thread.groups = 0, thread.copies.clear();
      warp(thread).ready = warp(thread).lanes |= thread.bit();
      warp(thread).registers = async.pool.at_launch;
      stacks_.start(thread.context, i, entry);
    }
  }

  unsigned char* shared() const { return memory_.data(); }
  SharedMemory& memory() { return memory_; }
  Warp& warp(const Thread& thread) { return warps_[thread.id / 32]; }
  void resume(const Thread& thread) { warp(thread).ready |= thread.bit(); }

  Stamp now(const Thread& thread) {
    Stamp stamp;
    stamp.epoch = epoch_, stamp.tick = warp(thread).tick, stamp.who = thread.id;
    return stamp;
  }
  // `whole_warp`: what one lane reads goes to all of them.
  void touch(const Thread& thread, const void* p, std::size_t bytes, Access access, bool whole_warp = false) {
    Stamp stamp = now(thread);
    if (whole_warp) stamp.who = Stamp::kWarp | (thread.id & ~31u);
    memory_.touch(thread, stamp, p, bytes, access);
  }

  // ---- waiting
  void wait(Thread& thread) {  // until somebody makes it ready
    warp(thread).ready &= ~thread.bit();
    Thread* next = pick();
    if (!next) [[unlikely]] next = elsewhere();
    self = next;
    ++switches;
    swap(thread.context, self ? self->context : *main);
  }
  void barrier(Thread& thread) {
    thread.at = "__syncthreads", thread.place = 0;
    if (++arrived_ < threads.size()) return wait(thread);
    arrived_ = 0, ++epoch_;
    if (clocks) [[unlikely]] meet(0, threads.size());
    for (Warp& warp : warps_) warp.ready = warp.lanes, warp.synced = ++warp.tick;
  }
  void warp_barrier(const Thread& thread) {
    if (clocks) [[unlikely]] meet(thread.id & ~31u, std::min<std::size_t>((thread.id | 31u) + 1, threads.size()));
    ++warp(thread).tick;
  }
  // Stays in a warp as long as a lane of it can run, so that warps run apart as far as they may.
  Thread* pick() {
    for (std::size_t tried = 0; tried < warps_.size(); ++tried) {
      if (const std::uint32_t ready = warps_[cursor_].ready)
        return &threads[cursor_ * 32 + (options.reverse ? 31 - __builtin_clz(ready) : __builtin_ctz(ready))];
      cursor_ = (cursor_ + (options.reverse ? warps_.size() - 1 : 1)) % warps_.size();
    }
    return nullptr;
  }

  // ---- what threads know of each other, once there are clocks
  void start_clocks(Clocks& all) {
    clocks = &all;
    memory_.order_by(all, rank);
    for (Thread& thread : threads)  // __syncthreads and __syncwarp so far
      for (Thread& other : threads)
        row(thread)[all.member(rank, other.id)] =
            (thread.id / 32 == other.id / 32 ? warp(other).tick : warp(other).synced) - 1;
  }
  Clocks::Time* row(const Thread& thread) { return clocks->row(rank, thread.id); }
  // What the thread did so far, others may come to know of.
  const Clocks::Time* release(const Thread& thread) {
    row(thread)[clocks->member(rank, thread.id)] = warp(thread).tick++;
    return row(thread);
  }
  // All of them come to know what each of them did.
  void meet(const std::vector<Thread*>& all) {
    Clocks::Row sum = clocks->empty();
    for (const Thread* const one : all) {
      row(*one)[clocks->member(rank, one->id)] = warp(*one).tick;
      clocks->join(sum.data(), row(*one));
    }
    for (const Thread* const one : all) std::copy(sum.begin(), sum.end(), row(*one));
  }
  [[gnu::noinline, gnu::cold]] void meet(std::size_t begin, std::size_t end) {
    std::vector<Thread*> all;
    for (std::size_t i = begin; i < end; ++i) all.push_back(&threads[i]);
    meet(all);
  }

  void tell(std::ostream& where) const {  // what every thread waits at
    for (std::size_t i = 0, next; i < threads.size(); i = next) {
      const Thread& one = threads[i];
      for (next = i; next < threads.size() && threads[next].waits_like(one);) ++next;
      where << (i ? ", " : "") << i << " to " << next - 1 << " are at " << one.at;
      if (one.place) async.mbarriers[one.place - 1].tell(where, shared());
    }
  }

  Cluster& cluster;
  const unsigned rank;
  const dim3 grid, dim;
  std::vector<Thread> threads;
  uint3 index;
  std::size_t alive = 0;
  Async async;               // mbarriers, named barriers, wgmma
  Clocks* clocks = nullptr;  // of the cluster, once they are needed
  Context* main = nullptr;   // where to go when no thread can run
  std::uint64_t switches = 0;

 private:
  Thread* elsewhere();  // in another block, or when what goes on by itself has gone on

  std::vector<Warp> warps_;
  const Stacks stacks_;
  SharedMemory memory_;
  std::size_t arrived_ = 0, cursor_ = 0;
  unsigned epoch_ = 1;  // counts __syncthreads
};

}  // namespace simt
