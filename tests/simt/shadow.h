// Shared memory of a block, and for every byte of it who wrote it last, who read it last, and whether it holds
// anything. Two accesses by different threads, one of them a write, must have a barrier between them: __syncthreads, or
// within a warp __syncwarp (of however many lanes: what a partial one leaves unordered goes unseen).
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "thread.h"

namespace simt {

enum class Access { read, write, issue, arrive };  // issue, arrive: the two ends of a cp.async

class Stamp {  // who touched a byte, and when
 public:
  enum State { uninitialised, pending, valid };
  static constexpr unsigned kWarp = 0x400, kMany = 0x800;

  // who: a thread; kWarp | lane 0 of a warp: all its lanes; kMany: several warps
  std::uint64_t epoch : 28 = 0, warp_epoch : 22 = 0, who : 12 = 0, state : 2 = uninitialised;

  unsigned warp() const { return (who & ~kWarp) / 32; }
  bool unordered(Stamp now) const {
    return epoch == now.epoch && who != now.who && (warp() != now.warp() || warp_epoch == now.warp_epoch);
  }
  // This read and one more, as one that orders the same writes. What a later read of the same warp is ordered before,
  // an earlier one is too.
  void add_read(Stamp now) {
    if (epoch != now.epoch || who == now.who)
      *this = now;
    else if (warp() != now.warp())
      who = kMany;
    else if (warp_epoch != now.warp_epoch)
      *this = now;
    else
      who = kWarp | now.warp() * 32;
  }
  friend std::ostream& operator<<(std::ostream& out, Stamp stamp) {
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
  }

  // `now`: who does it and when, by the barriers passed.
  void touch(const Thread& by, Stamp now, const void* p, std::size_t bytes, Access access) {
    const std::size_t at = static_cast<const unsigned char*>(p) - data_;  // huge if p is below
    if (at > shadow_.size() || bytes > shadow_.size() - at)
      fail(Fault::bounds, by, access == Access::read ? "reads " : "writes ", bytes, " bytes at shared+",
           static_cast<std::ptrdiff_t>(at), " of ", shadow_.size());
    if (at % bytes) fail(Fault::alignment, by, "touches ", bytes, " bytes at shared+", at);
    if (!options.race && !options.trap) return;
    now.state = access == Access::issue ? Stamp::pending : Stamp::valid;
    for (std::size_t i = at; i < at + bytes; ++i)
      if (access == Access::read)
        read(by, now, i);
      else
        write(by, now, i, access);
  }

 private:
  struct Cell {
    Stamp write, read;
  };

  void read(const Thread& by, Stamp now, std::size_t at) {
    Cell& cell = shadow_[at];
    if (options.trap && cell.write.state != Stamp::valid)
      fail(Fault::poison, by, "reads shared+", at,
           cell.write.state == Stamp::pending ? ", which a cp.async not waited for fills"
                                              : ", which nothing was written to");
    if (options.race && cell.write.unordered(now)) clash(by, now, at, " reads what ", cell.write, " wrote");
    cell.read.add_read(now);
  }
  void write(const Thread& by, Stamp now, std::size_t at, Access access) {
    Cell& cell = shadow_[at];
    if (options.race && cell.write.state == Stamp::pending && access != Access::arrive)
      fail(Fault::race, by, "writes shared+", at, ", which a cp.async of ", cell.write, " still fills");
    if (options.race && cell.write.unordered(now)) clash(by, now, at, " writes over what ", cell.write, " wrote");
    if (options.race && cell.read.unordered(now)) clash(by, now, at, " writes over what ", cell.read, " read");
    cell.write = now;
  }
  [[noreturn, gnu::cold]] static void clash(const Thread& by, Stamp now, std::size_t at, const char* does, Stamp other,
                                            const char* did) {
    fail(Fault::race, by, "at shared+", at, ": ", now, does, other, did, ", no barrier between");
  }

  static constexpr std::align_val_t kAlignment{1024};
  std::vector<Cell> shadow_;
  unsigned char* const data_;
};

}  // namespace simt
