// Which accesses to shared memory are ordered, where __syncthreads and __syncwarp are not all that orders them: a
// vector clock for every thread of a cluster, switched on by the first mbarrier, named barrier, wgmma or cluster_sync.
//
// Every warp counts the time: a tick goes by whenever a thread of it releases what it did. A thread's row of the table
// says up to which tick it knows what each other one did. Whoever arrives at a barrier adds its row to the barrier's;
// whoever has waited there takes the barrier's into its own. Not only threads do something: an mbarrier stands for what
// TMA wrote until its phase p was complete (tick p + 1), a warpgroup for what its wgmma of group g read (tick g + 1).
// The second half of a row is what wgmma and TMA see of it: what went through a fence_async on the way.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace simt {

class Clocks {
 public:
  using Time = std::uint32_t;
  using Row = std::vector<Time>;
  static constexpr unsigned kMbarriers = 64, kWarpgroups = 8;  // of a block

  Clocks(unsigned blocks, unsigned threads)
      : threads_(threads),
        members_(threads + kWarpgroups + kMbarriers),
        size_(blocks * members_),
        rows_(2 * std::size_t(size_) * blocks * threads) {}

  void forget() { std::fill(rows_.begin(), rows_.end(), 0); }

  Row empty() const { return Row(2 * size_); }
  Time* row(unsigned rank, unsigned thread) { return &rows_[2 * std::size_t(size_) * (rank * threads_ + thread)]; }
  const Time* row(unsigned rank, unsigned thread) const { return const_cast<Clocks*>(this)->row(rank, thread); }
  unsigned member(unsigned rank, unsigned thread) const { return rank * members_ + thread; }
  unsigned async_member(unsigned rank, unsigned who) const { return member(rank, threads_ + who); }
  static constexpr unsigned mbarrier(unsigned i) { return kWarpgroups + i; }  // warpgroups come first

  bool knows(unsigned rank, unsigned thread, unsigned member, Time tick) const {
    return row(rank, thread)[member] >= tick;
  }
  bool knows_through_fence(unsigned rank, unsigned thread, unsigned member, Time tick) const {
    return row(rank, thread)[size_ + member] >= tick;
  }

  void join(Time* to, const Time* from) const {
    for (unsigned i = 0; i < 2 * size_; ++i) to[i] = std::max(to[i], from[i]);
  }
  void fence(unsigned rank, unsigned thread) {
    Time* const all = row(rank, thread);
    for (unsigned i = 0; i < size_; ++i) all[size_ + i] = std::max(all[size_ + i], all[i]);
  }

  unsigned size() const { return size_; }
  std::string name(unsigned member) const {
    const unsigned rank = member / members_, who = member % members_;
    return (who < threads_ ? "thread " + std::to_string(who) : "TMA") + " of block " + std::to_string(rank);
  }

 private:
  const unsigned threads_;
  const unsigned members_;  // of a block: its threads, its warpgroups' wgmma, its mbarriers
  const unsigned size_;
  std::vector<Time> rows_;
};

}  // namespace simt
