// Blocks of a cluster, run together by one host thread. A grid is its clusters, one after the other on each worker: a
// block that waits for one of another cluster waits for ever.
#pragma once
#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "block.h"

namespace simt {

inline std::atomic<std::uint64_t> switches;  // from fiber to fiber, since it was set to zero

class Cluster {
 public:
  Cluster(const std::function<void()>& kernel, dim3 grid, dim3 block, std::size_t shared_bytes, unsigned size)
      : kernel_(kernel) {
    for (unsigned i = 0; i < size; ++i) {
      blocks.push_back(std::make_unique<Block>(*this, i, grid, block, shared_bytes));
      blocks.back()->main = &main_;
    }
  }
  ~Cluster() {
    for (const auto& block : blocks) switches += block->switches;
  }

  void run(uint3 first) {
    in_flight.clear(), arrived_.clear();
    for (const auto& block : blocks) block->reset({first.x + block->rank, first.y, first.z}, entry);
    current_ = options.reverse ? blocks.size() - 1 : 0;
    self = next();
    swap(main_, self->context);  // comes back when no thread can run
    self = nullptr;
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    if (alive()) stuck();
  }

  // The clocks, on from here; none if nobody looks for races.
  Clocks* clocks() {
    if (!options.race) return nullptr;
    if (blocks[0]->clocks) return blocks[0]->clocks;
    if (clocks_)
      clocks_->forget();
    else
      clocks_ = std::make_unique<Clocks>(blocks.size(), blocks[0]->threads.size());
    for (const auto& block : blocks) {
      block->start_clocks(*clocks_);
      block->async.visits.assign(clocks_->size(), 0);
    }
    return clocks_.get();
  }

  // The next thread that can run, once no other thread of its block can; if there is none at all, what goes on by
  // itself goes on: as late as can be, and last things first.
  Thread* next() {
    for (;;) {
      for (std::size_t tried = 0; tried < blocks.size(); ++tried) {
        if (Thread* const found = blocks[current_]->pick()) return found;
        current_ = (current_ + (options.reverse ? blocks.size() - 1 : 1)) % blocks.size();
      }
      if (in_flight.empty()) return nullptr;
      const std::function<void()> arrival = std::move(in_flight.back());
      in_flight.pop_back();
      arrival();
    }
  }

  // cluster_sync: of all threads that have not ended.
  void barrier(Thread& thread) {
    thread.at = "cluster_sync", thread.place = 0;
    arrived_.push_back(&thread);
    if (arrived_.size() < alive()) return thread.block->wait(thread);
    release_all();
  }

  std::size_t alive() const {
    std::size_t sum = 0;
    for (const auto& block : blocks) sum += block->alive;
    return sum;
  }

  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::function<void()>> in_flight;  // copies by TMA

 private:
  // An error leaves the other fibers where they are: destructors of what lives in a kernel do not run then.
  static void entry() {
    Thread& thread = *self;
    Cluster& cluster = thread.block->cluster;
    try {
      cluster.kernel_();
      cluster.end(thread);
    } catch (...) {
      cluster.error_ = std::current_exception();
    }
    self = nullptr;
    swap(thread.context, cluster.main_);
  }

  void end(Thread& thread) {
    Block& block = *thread.block;
    thread.at = "its end", thread.place = 0;
    if (!block.async.warpgroups[thread.id / 128].in_flight.empty())
      fail(Fault::lifetime, thread, "ends while wgmma of its warpgroup go on");
    if (--block.alive == 0 && block.clocks) check_visits(block);
    if (!arrived_.empty() && arrived_.size() == alive()) release_all();
    block.wait(thread);
  }

  void release_all() {
    if (clocks()) {
      Clocks::Row all = clocks_->empty();
      for (Thread* const one : arrived_) clocks_->join(all.data(), one->block->release(*one));
      for (Thread* const one : arrived_) std::copy(all.begin(), all.end(), one->block->row(*one));
    }
    for (Thread* const one : arrived_) one->block->resume(*one);
    arrived_.clear();
  }

  // When a block is gone, nobody may write to it or arrive at its barriers any more: some thread of it must have known
  // of the last time.
  void check_visits(Block& block) {
    Clocks::Row all = clocks_->empty();
    for (const Thread& thread : block.threads) clocks_->join(all.data(), block.row(thread));
    for (unsigned i = 0; i < block.async.visits.size(); ++i)
      if (block.async.visits[i] > all[i])
        fail(Fault::lifetime, *self, "ends its block, and nothing made it wait for what ", clocks_->name(i),
             " does there");
  }

  [[noreturn]] void stuck() const {
    std::ostringstream where;
    const char* separator = "";
    for (const auto& block : blocks) {
      where << std::exchange(separator, "; ");
      if (blocks.size() > 1) where << "in block " << block->rank << " of the cluster ";
      block->tell(where);
    }
    const auto first = std::find_if(blocks.begin(), blocks.end(), [](const auto& block) { return block->alive; });
    fail(Fault::divergence, (*first)->threads[0], "and others wait for ever: ", where.str());
  }

  const std::function<void()>& kernel_;
  std::unique_ptr<Clocks> clocks_;
  std::vector<Thread*> arrived_;  // at cluster_sync
  Context main_;
  std::exception_ptr error_;
  std::size_t current_ = 0;
};

[[gnu::noinline]] inline Thread* Block::elsewhere() {
  return cluster.next();
}

inline void check_launch(dim3 grid, dim3 block, std::size_t shared_bytes, int cluster) {
  constexpr std::size_t kMostThreads = 1024, kMostShared = 227 << 10;  // the largest of all GPUs: sm_90, sm_100
  constexpr int kMostBlocks = 8;                                       // of a cluster that every such GPU takes
  const std::size_t threads = std::size_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMostThreads) throw Error("launch: a block of " + std::to_string(threads) + " threads");
  if (shared_bytes > kMostShared)
    throw Error("launch: " + std::to_string(shared_bytes) + " bytes of shared memory in a block");
  if (grid.x * grid.y * grid.z == 0) throw Error("launch: a grid without blocks");
  if (cluster < 1 || cluster > kMostBlocks || grid.x % cluster)
    throw Error("launch: clusters of " + std::to_string(cluster) + " in a grid of " + std::to_string(grid.x) +
                " blocks along x");
}

inline void run_grid(const std::function<void()>& kernel, dim3 grid, dim3 block, std::size_t shared_bytes,
                     int cluster = 1) {
  check_launch(grid, block, shared_bytes, cluster);
  const unsigned row = grid.x / cluster, clusters = row * grid.y * grid.z;
  std::atomic<unsigned> next = 0;
  std::exception_ptr error;
  std::mutex guard;
  const auto work = [&] {
    try {
      Cluster own(kernel, grid, block, shared_bytes, cluster);
      for (unsigned i; (i = next++) < clusters;) own.run({i % row * cluster, i / row % grid.y, i / row / grid.y});
    } catch (...) {
      const std::lock_guard lock(guard);
      error = std::current_exception();
      next = clusters;
    }
  };
  std::vector<std::thread> helpers;
  for (int i = 1; i < options.workers; ++i) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace simt
