// A CUDA thread as a fiber, the options it runs under, and how its mistakes are reported.
#pragma once
#include <cstdint>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "fiber.h"
#include "vectors.h"

namespace simt {

struct Options {
  bool race = true;       // report accesses to shared memory that nothing orders
  bool trap = true;       // report reads of poison; otherwise they give bytes of 0xff, NaN in every float format
  bool reverse = false;   // run lanes and warps in the opposite order
  bool truncate = false;  // float mma rounds toward zero, not to nearest; approximate functions err as far as they may
  int workers = 1;        // host threads that share the blocks of a grid
  bool eager = false;     // TMA and wgmma do their work when they are asked to, not when somebody has to wait for it
};
inline Options options;

enum class Fault { bounds, alignment, read_only, poison, race, divergence, launch, misuse, lifetime };
constexpr const char* kFaultNames[] = {"out of bounds", "misaligned", "read-only", "poison",  "race",
                                       "divergence",    "launch",     "misuse",    "lifetime"};
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Block;

struct Copy {  // a cp.async in flight
  unsigned char* to;
  unsigned char data[16];
  unsigned size, group;
};

struct Thread {
  Context context;
  Block* block = nullptr;
  uint3 index, block_index;  // threadIdx, blockIdx
  unsigned id = 0;           // its place in the block, x fastest; id % 32 is its lane
  unsigned rank = 0;         // of its block in the cluster

  std::vector<Copy> copies;
  unsigned groups = 0;  // of copies, committed so far

  // The barrier or warp instruction that it waits at, or last waited at.
  const char* at = nullptr;
  const void* instruction = nullptr;
  void* operands = nullptr;
  std::uint32_t mask = 0;  // lanes that take part
  unsigned place = 0;      // the mbarrier, plus one

  std::uint32_t bit() const { return 1u << id % 32; }
  bool waits_like(const Thread& other) const { return !std::strcmp(at, other.at) && place == other.place; }
};

// The thread that runs. constinit: no check on every use whether it has been initialised.
inline constinit thread_local Thread* self = nullptr;

template <class... Words>
[[noreturn, gnu::cold, gnu::noinline]] void fail(Fault fault, const Thread& thread, const Words&... words) {
  std::ostringstream sentence;
  sentence << kFaultNames[static_cast<int>(fault)] << ": block " << thread.block_index << " thread " << thread.index
           << ' ';
  (sentence << ... << words);
  throw Error(sentence.str());
}

}  // namespace simt
