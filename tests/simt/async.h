// What a block has of Hopper's barriers and of work that goes on by itself.
#pragma once
#include <algorithm>
#include <cstdint>
#include <ostream>
#include <vector>

#include "clocks.h"
#include "thread.h"

namespace simt {

struct Mbarrier {
  const void* at = nullptr;
  unsigned initialiser = 0;  // thread
  bool visible = false;      // to TMA and to other blocks
  int arrivals = 0, pending = 0;
  std::int64_t bytes = 0;  // to come
  unsigned phase = 0;      // the one that is not complete yet
  std::vector<Thread*> waiting;
  Clocks::Row known, done;  // of those who arrived in this phase, and until the last one was complete

  void tell(std::ostream& where, const unsigned char* shared) const {
    where << " at shared+" << static_cast<const unsigned char*>(at) - shared << ", phase " << phase << ", " << pending
          << " of " << arrivals << " arrivals and " << bytes << " bytes to come";
  }
};

struct NamedBarrier {
  unsigned threads = 0;  // that it is for
  std::vector<Thread*> waiting;
};

// Sums of a wgmma, or of several that add to the same registers one after the other.
struct Accumulators {
  std::vector<int*> registers;  // of each thread
  int columns = 0;
  std::vector<int> sums;   // thread by thread: what wgmma will give back, or what it gave back last
  unsigned in_flight = 0;  // wgmma that have them
  bool fenced = false;     // since wgmma gave them back
};

struct Wgmma {
  std::size_t accumulators;
  std::vector<std::uint32_t> a;  // four registers of each thread, or none
  std::uint64_t a_tile, b_tile;
  bool add;
  unsigned group;
};

struct Warpgroup {
  unsigned waiting = 0;  // threads at an instruction
  bool fenced = false;
  unsigned groups = 0, done = 0;  // committed, and known to be complete
  std::vector<Accumulators> accumulators;
  std::vector<Wgmma> in_flight;
};

// Registers that no warp has; in `waiting` are those who want more than there are.
struct RegisterPool {
  unsigned at_launch = 0, free = 0;
  std::vector<Thread*> waiting;
};

struct Async {
  explicit Async(std::size_t threads = 0) : warpgroups((threads + 127) / 128) {
    constexpr unsigned kAll = 65536, kMost = 256;
    // What the assembler gives a kernel of one block per multiprocessor that asks for more.
    if (threads) pool.at_launch = std::min<unsigned>(kMost, kAll / threads) / 8 * 8;
    mbarriers.reserve(Clocks::kMbarriers);  // who waits at one keeps a reference to it
  }
  std::vector<Mbarrier> mbarriers;
  NamedBarrier named[16];
  std::vector<Warpgroup> warpgroups;
  RegisterPool pool;
  std::vector<Clocks::Time> visits;  // by member of the clocks: until when it must not be gone
};

}  // namespace simt
