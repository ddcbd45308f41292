// A block of threads, run by one host thread: a fiber runs until it has to wait, then the next that can. A grid is its
// blocks, one after the other on each worker: a block that waits for another one waits for ever.
#pragma once
#include <atomic>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "buffer.h"
#include "shadow.h"
#include "thread.h"

namespace simt {

inline std::atomic<std::uint64_t> switches;  // from fiber to fiber, since it was set to zero

struct Warp {
  std::uint32_t lanes = 0, ready = 0, waiting = 0;  // lanes that there are, that can run, that wait at an instruction
  unsigned epoch = 1;                               // counts __syncwarp
};

class Block {
 public:
  Block(const std::function<void()>& kernel, dim3 grid_size, dim3 size, std::size_t shared_bytes)
      : grid(grid_size),
        dim(size),
        threads(size.x * size.y * size.z),
        kernel_(kernel),
        warps_((threads.size() + 31) / 32),
        stacks_(threads.size()),
        memory_(shared_bytes) {}
  ~Block() { switches += switches_; }

  void run(uint3 index) {
    reset(index);
    self = pick();
    swap(main_, self->context);  // comes back when no thread can run
    self = nullptr;
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    if (alive_) stuck();
  }

  unsigned char* shared() const { return memory_.data(); }
  Warp& warp(const Thread& thread) { return warps_[thread.id / 32]; }

  // `whole_warp`: what one lane reads goes to all of them.
  void touch(const Thread& thread, const void* p, std::size_t bytes, Access access, bool whole_warp = false) {
    Stamp now;
    now.epoch = epoch_, now.warp_epoch = warp(thread).epoch;
    now.who = whole_warp ? Stamp::kWarp | (thread.id & ~31u) : thread.id;
    memory_.touch(thread, now, p, bytes, access);
  }

  void wait(Thread& thread) {  // until somebody makes it ready
    warp(thread).ready &= ~thread.bit();
    self = error_ ? nullptr : pick();
    ++switches_;
    swap(thread.context, self ? self->context : main_);
  }
  void barrier(Thread& thread) {
    thread.at = "__syncthreads";
    if (++arrived_ < threads.size()) return wait(thread);
    arrived_ = 0, ++epoch_;
    for (Warp& warp : warps_) warp.ready = warp.lanes;
  }

  const dim3 grid, dim;
  std::vector<Thread> threads;

 private:
  void reset(uint3 index) {
    epoch_ = 1, arrived_ = 0, alive_ = threads.size();
    cursor_ = options.reverse ? warps_.size() - 1 : 0;
    memory_.forget();
    warps_.assign(warps_.size(), {});
    for (unsigned i = 0; i < threads.size(); ++i) {
      Thread& thread = threads[i];
      thread.block = this, thread.id = i, thread.block_index = index;
      thread.index = {i % dim.x, i / dim.x % dim.y, i / dim.x / dim.y};
      thread.groups = 0, thread.copies.clear();
      warp(thread).ready = warp(thread).lanes |= thread.bit();
      stacks_.start(thread.context, i, entry);
    }
  }
  // An error leaves the other fibers where they are: destructors of what lives in a kernel do not run then.
  static void entry() {
    Thread& thread = *self;
    Block& block = *thread.block;
    try {
      block.kernel_();
    } catch (...) {
      block.error_ = std::current_exception();
    }
    thread.at = "its end", --block.alive_;
    block.wait(thread);
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
  [[noreturn]] void stuck() const {
    std::ostringstream where;
    for (std::size_t i = 0, next; i < threads.size(); i = next) {
      for (next = i; next < threads.size() && !std::strcmp(threads[next].at, threads[i].at);) ++next;
      where << (i ? ", " : "") << i << " to " << next - 1 << " are at " << threads[i].at;
    }
    fail(Fault::divergence, threads[0], "and others wait for ever: ", where.str());
  }

  const std::function<void()>& kernel_;
  std::vector<Warp> warps_;
  const Stacks stacks_;
  SharedMemory memory_;
  Context main_;
  std::exception_ptr error_;
  std::size_t alive_ = 0, arrived_ = 0, cursor_ = 0;
  unsigned epoch_ = 1;  // counts __syncthreads
  std::uint64_t switches_ = 0;
};

inline void check_launch(dim3 block, std::size_t shared_bytes) {
  constexpr std::size_t kMostThreads = 1024, kMostShared = 227 << 10;  // the largest of all GPUs: sm_90, sm_100
  const std::size_t threads = std::size_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMostThreads) throw Error("launch: a block of " + std::to_string(threads) + " threads");
  if (shared_bytes > kMostShared)
    throw Error("launch: " + std::to_string(shared_bytes) + " bytes of shared memory in a block");
}

inline void run_grid(const std::function<void()>& kernel, dim3 grid, dim3 block, std::size_t shared_bytes,
                     int cluster = 1) {
  check_launch(block, shared_bytes);
  if (cluster != 1) throw Error("launch: clusters have no model yet");
  const unsigned blocks = grid.x * grid.y * grid.z;
  if (blocks == 0) throw Error("launch: a grid without blocks");
  std::atomic<unsigned> next = 0;
  std::exception_ptr error;
  std::mutex guard;
  const auto work = [&] {
    try {
      Block own(kernel, grid, block, shared_bytes);
      for (unsigned i; (i = next++) < blocks;) own.run({i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y});
    } catch (...) {
      const std::lock_guard lock(guard);
      error = std::current_exception();
      next = blocks;
    }
  };
  std::vector<std::thread> helpers;
  for (int i = 1; i < options.workers; ++i) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace simt
