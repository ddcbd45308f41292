// Shared memory of a block, and for every byte of it who wrote it last, who read it last, and whether it holds
// anything. Two accesses by different threads, one of them a write, must have a barrier between them: __syncthreads,
// within a warp __syncwarp (of however many lanes: what a partial one leaves unordered goes unseen), or what clocks.h
// follows.
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "clocks.h"
#include "thread.h"

namespace simt {

enum class Access { read, write, issue, arrive };  // issue, arrive: the two ends of a copy by cp.async or TMA

class Stamp {  // who touched a byte, and when
 public:
  enum State { uninitialised, pending, valid };
  static constexpr unsigned kWarp = 0x400, kMany = 0x800, kWarpgroup = 0xc00, kMbarrier = kWarpgroup + 8;

  // who: a thread; kWarp | lane 0 of a warp: all its lanes; kMany: several warps; kWarpgroup + i: its wgmma;
  // kMbarrier + i: TMA that is counted there
  std::uint64_t epoch : 28 = 0, tick : 22 = 0, who : 12 = 0, state : 2 = uninitialised;

  bool is_thread() const { return who < kWarp; }
  bool is_async() const { return who >= kWarpgroup; }
  unsigned warp() const { return (who & ~kWarp) / 32; }
  // By __syncthreads and __syncwarp alone; they do not order what wgmma and TMA do.
  bool unordered(Stamp now) const {
    return is_async() || (epoch == now.epoch && who != now.who && (warp() != now.warp() || tick == now.tick));
  }
  // This read and one more, as one that orders the same writes. What a later read of the same warp is ordered before,
  // an earlier one is too.
  void add_read(Stamp now) {
    if (epoch != now.epoch || who == now.who)
      *this = now;
    else if (warp() != now.warp())
      who = kMany;
    else if (tick != now.tick)
      *this = now;
    else
      who = kWarp | now.warp() * 32;
  }
  friend bool operator==(Stamp, Stamp) = default;
  friend std::ostream& operator<<(std::ostream& out, Stamp stamp) {
    if (stamp.who >= kMbarrier) return out << "TMA";
    if (stamp.is_async()) return out << "wgmma of warpgroup " << stamp.who - kWarpgroup;
    if (stamp.who & kMany) return out << "several warps";
    return stamp.who & kWarp ? out << "warp " << stamp.warp() : out << "thread " << stamp.who;
  }
};

class SharedMemory {
 public:
  explicit SharedMemory(std::size_t bytes)
      : shadow_(bytes), data_(static_cast<unsigned char*>(::operator new(bytes + 1, kAlignment))) {}
  ~SharedMemory() { ::operator delete(data_, kAlignment); }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  unsigned char* data() const { return data_; }
  void forget() {
    std::memset(data_, 0xff, shadow_.size());
    shadow_.assign(shadow_.size(), {});
    clocks_ = nullptr;
  }
  // From here on, with what they know. `rank`: of the block whose memory this is.
  void order_by(const Clocks& clocks, unsigned rank) {
    clocks_ = &clocks, rank_ = rank;
    earlier_reads_.assign(shadow_.size(), 0), nodes_.assign(1, {}), free_ = 0;
  }

  // `now`: who does it and when, by the barriers passed.
  void touch(const Thread& by, Stamp now, const void* p, std::size_t bytes, Access access) {
    const std::size_t at = place(by, p, bytes, access);
    if (at % bytes) fail(Fault::alignment, by, "touches ", bytes, " bytes at shared+", at);
    if (!options.race && !options.trap) return;
    now.state = access == Access::issue ? Stamp::pending : Stamp::valid;
    for (std::size_t i = at; i < at + bytes; ++i)
      if (access == Access::read)
        read(by, now, i);
      else
        write(by, now, i, access);
  }

  // What wgmma reads or TMA writes, asked for by `count` threads from `by` on: all of them have to know what was there
  // before. Mostly all bytes have the same past: the last one's has been looked at.
  struct Bulk {
    const Thread* by;
    unsigned count;
    Stamp now;
    Access access;
    bool begun = false;
    Stamp write = {}, read = {};
  };
  void touch(Bulk& bulk, const void* p, std::size_t bytes) {
    const std::size_t at = place(*bulk.by, p, bytes, bulk.access);
    if (!options.race && !options.trap) return;
    bulk.now.state = bulk.access == Access::issue ? Stamp::pending : Stamp::valid;
    for (std::size_t i = at; i < at + bytes; ++i) {
      Cell& cell = shadow_[i];
      if (bulk.access != Access::arrive) look_back(bulk, cell, i);
      if (bulk.access == Access::read)
        add_read(*bulk.by, bulk.now, i);
      else
        forget_reads(i), cell.write = bulk.now;
    }
  }

  // That what `by` is about to use was written before, as far as it knows.
  void check_written(const Thread& by, Stamp now, const void* p, std::size_t bytes) const {
    const std::size_t at = place(by, p, bytes, Access::read);
    for (std::size_t i = at; options.race && i < at + bytes; ++i)
      if (!ordered(by, shadow_[i].write, now)) clash(by, now, i, " uses what ", shadow_[i].write, " wrote");
  }

 private:
  struct Cell {
    Stamp write, read;
  };
  struct Node {  // reads of a byte before its last one, and not ordered before that
    Stamp read;
    unsigned next = 0;
  };

  std::size_t place(const Thread& by, const void* p, std::size_t bytes, Access access) const {
    const std::size_t at = static_cast<const unsigned char*>(p) - data_;  // huge if p is below
    if (at > shadow_.size() || bytes > shadow_.size() - at)
      fail(Fault::bounds, by, access == Access::read ? "reads " : "writes ", bytes, " bytes at shared+",
           static_cast<std::ptrdiff_t>(at), " of ", shadow_.size());
    return at;
  }

  bool ordered(const Thread& by, Stamp then, Stamp now) const {
    return (by.rank == rank_ && !then.unordered(now)) || (clocks_ && knows(by, then, false));
  }
  // kMany: from before there were clocks. Taken for ordered, as nobody knows better.
  bool knows(const Thread& by, Stamp then, bool through_fence) const {
    const unsigned lanes = then.is_async() || then.is_thread() ? 1 : then.who & Stamp::kMany ? 0 : 32;
    for (unsigned i = 0; i < lanes; ++i) {
      const unsigned member = then.is_async() ? clocks_->async_member(rank_, then.who - Stamp::kWarpgroup)
                                              : clocks_->member(rank_, (then.who & ~Stamp::kWarp) + i);
      if (!(through_fence ? clocks_->knows_through_fence(by.rank, by.id, member, then.tick)
                          : clocks_->knows(by.rank, by.id, member, then.tick)))
        return false;
    }
    return true;
  }

  void read(const Thread& by, Stamp now, std::size_t at) {
    Cell& cell = shadow_[at];
    if (options.trap && cell.write.state != Stamp::valid) poison(by, cell.write, at);
    if (options.race && !ordered(by, cell.write, now)) clash(by, now, at, " reads what ", cell.write, " wrote");
    add_read(by, now, at);
  }
  void write(const Thread& by, Stamp now, std::size_t at, Access access) {
    Cell& cell = shadow_[at];
    if (options.race) {
      if (cell.write.state == Stamp::pending && access != Access::arrive) still_filled(by, cell.write, at);
      if (!ordered(by, cell.write, now)) clash(by, now, at, " writes over what ", cell.write, " wrote");
      if (!ordered(by, cell.read, now)) clash(by, now, at, " writes over what ", cell.read, " read");
      if (clocks_)
        for (unsigned node = earlier_reads_[at]; node; node = nodes_[node].next)
          if (!ordered(by, nodes_[node].read, now))
            clash(by, now, at, " writes over what ", nodes_[node].read, " read");
    }
    if (clocks_) forget_reads(at);
    cell.write = now;
  }

  // ---- reads by several, as clocks need them: one by one
  void add_read(const Thread& by, Stamp now, std::size_t at) {
    Stamp& last = shadow_[at].read;
    if (!clocks_) return last.add_read(now);
    if (last == now) return;
    // What `now` is ordered after, whoever knows of `now` knows too. For wgmma that need not be so, as of its 128
    // threads only one is asked.
    const auto is_covered = [&](Stamp then) {
      return then.who == now.who || (!now.is_async() && ordered(by, then, now));
    };
    unsigned* link = &earlier_reads_[at];
    while (*link)
      if (is_covered(nodes_[*link].read))
        release(*link);
      else
        link = &nodes_[*link].next;
    if (last.tick && !is_covered(last)) push(at, last);
    last = now;
  }
  void push(std::size_t at, Stamp read) {
    unsigned node = free_;
    if (node)
      free_ = nodes_[node].next;
    else
      node = nodes_.size(), nodes_.emplace_back();
    nodes_[node] = {read, earlier_reads_[at]};
    earlier_reads_[at] = node;
  }
  void release(unsigned& link) {
    const unsigned node = link;
    link = nodes_[node].next;
    nodes_[node].next = free_, free_ = node;
  }
  void forget_reads(std::size_t at) {
    if (!clocks_) return;
    shadow_[at].read = {};
    while (earlier_reads_[at]) release(earlier_reads_[at]);
  }

  // ---- what wgmma and TMA do
  void look_back(Bulk& bulk, const Cell& cell, std::size_t at) const {
    if (!bulk.begun || cell.write != bulk.write) {
      const bool pending = cell.write.state == Stamp::pending;
      if (options.trap && bulk.access == Access::read && cell.write.state != Stamp::valid)
        poison(*bulk.by, cell.write, at);
      if (options.race && pending) still_filled(*bulk.by, cell.write, at);
      if (options.race) check(bulk, cell.write, at, false);
    }
    if (options.race && bulk.access == Access::issue) {
      if (!bulk.begun || cell.read != bulk.read) check(bulk, cell.read, at, true);
      for (unsigned node = earlier_reads_[at]; node; node = nodes_[node].next) check(bulk, nodes_[node].read, at, true);
    }
    bulk.begun = true, bulk.write = cell.write, bulk.read = cell.read;
  }
  // Generic writes have to go through a fence_async to them. So should generic reads, to a write of theirs; but a
  // barrier is all that anybody puts there.
  void check(const Bulk& bulk, Stamp then, std::size_t at, bool was_read) const {
    const char* const does = bulk.access == Access::read ? " reads what " : " writes over what ";
    for (unsigned i = 0; then.tick && i < bulk.count; ++i) {
      const Thread& by = bulk.by[i];
      const bool own = by.rank == rank_ && then.who == by.id;
      if (!own && !knows(by, then, false)) clash(by, bulk.now, at, does, then, was_read ? " read" : " wrote");
      if (!was_read && !then.is_async() && !knows(by, then, true))
        fail(Fault::race, by, "at shared+", at, ": ", bulk.now, does, then, " wrote, no fence_async between");
    }
  }

  // ---- sentences
  [[noreturn, gnu::cold]] static void poison(const Thread& by, Stamp write, std::size_t at) {
    fail(Fault::poison, by, "reads shared+", at,
         write.state != Stamp::pending ? ", which nothing was written to"
         : write.is_async()            ? ", which a TMA load not waited for fills"
                                       : ", which a cp.async not waited for fills");
  }
  [[noreturn, gnu::cold]] static void still_filled(const Thread& by, Stamp write, std::size_t at) {
    if (write.is_async()) fail(Fault::race, by, "writes shared+", at, ", which a TMA load still fills");
    fail(Fault::race, by, "writes shared+", at, ", which a cp.async of ", write, " still fills");
  }
  [[noreturn, gnu::cold]] static void clash(const Thread& by, Stamp now, std::size_t at, const char* does, Stamp other,
                                            const char* did) {
    fail(Fault::race, by, "at shared+", at, ": ", now, does, other, did, ", no barrier between");
  }

  static constexpr std::align_val_t kAlignment{1024};
  std::vector<Cell> shadow_;
  unsigned char* const data_;
  const Clocks* clocks_ = nullptr;
  unsigned rank_ = 0, free_ = 0;
  std::vector<unsigned> earlier_reads_;  // of a byte: the first node, or 0
  std::vector<Node> nodes_;
};

}  // namespace simt
