// wgmma: four warps multiply out of shared memory, while they do something else. Their sums are garbage until a
// wgmma_wait gives them back; shared memory is read only then (or at once: Options::eager), so that what overwrites it
// too early shows in the result, too.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "numbers.h"
#include "tma.h"

namespace simt {

constexpr int kWgmmaThreads = 128, kWgmmaRows = 64, kWgmmaDepth = 32;

// As a warp instruction, of four warps. `execute` gets the operands of each of their threads.
template <class Operands, class Execute>
void of_warpgroup(const char* name, Operands mine, Execute execute) {
  Thread& me = *self;
  Block& block = *me.block;
  static constexpr char instruction = 0;
  const unsigned first = me.id / kWgmmaThreads * kWgmmaThreads;
  if (first + kWgmmaThreads > block.threads.size())
    fail(Fault::divergence, me, "is at ", name, " in a warpgroup of fewer threads");
  block.cluster.clocks();
  me.at = name, me.place = 0, me.instruction = &instruction, me.operands = &mine;
  Warpgroup& group = block.async.warpgroups[me.id / kWgmmaThreads];
  if (++group.waiting < kWgmmaThreads) return block.wait(me);
  group.waiting = 0;
  Operands* all[kWgmmaThreads];
  for (int i = 0; i < kWgmmaThreads; ++i) {
    const Thread& other = block.threads[first + i];
    if (other.instruction != &instruction)
      fail(Fault::divergence, me, "is at ", name, ", thread ", other.id, " at ", other.at);
    all[i] = static_cast<Operands*>(other.operands);
  }
  execute(group, &block.threads[first], all);
  for (int i = 0; i < kWgmmaThreads; ++i) block.resume(block.threads[first + i]);
}

// ---- tiles ----------------------------------------------------------------------------------------------------------
class WgmmaTile {  // rows of 32 bytes, as a descriptor says
 public:
  WgmmaTile(Block& block, std::uint64_t descriptor)
      : block_(block), start_((descriptor & 0x3fff) << 4), eight_rows_((descriptor >> 32 & 0x3fff) << 4) {
    constexpr std::uint64_t kMode = std::uint64_t(3) << 62, kMode128 = std::uint64_t(1) << 62;
    constexpr std::uint64_t kNone = 0x3fffc000c000c000;  // bits without a meaning, and the base offset
    constexpr std::uint32_t kPattern = 1024;
    const auto expect = [&](bool is_so, const char* what) {
      if (!is_so)
        fail(Fault::misuse, *self, "multiplies by wgmma with descriptor ", std::hex, descriptor, ", which ", what);
    };
    expect((descriptor & kMode) == kMode128, "has not the 128-byte swizzle, the only one that the model knows");
    expect(!(descriptor & kNone), "has bits set where there are to be none");
    expect(eight_rows_ % kPattern == 0, "has groups of eight rows that do not begin at multiples of 1024");
    expect(start_ % kPattern + kWgmmaDepth <= 128, "does not begin in the first row of 1024 bytes");
  }
  // 16 bytes of a row. The swizzle is one of addresses.
  const unsigned char* chunk(int row, int i) const {
    const std::uint32_t linear = start_ + row / 8 * eight_rows_ + row % 8 * 128 + i * 16;
    return block_.shared() + (std::ptrdiff_t(swizzled(linear)) - kSharedBase);
  }
  void touch(SharedMemory::Bulk& bulk, int rows) const {
    for (int row = 0; row < rows; ++row)
      for (int i = 0; i < 2; ++i) block_.memory().touch(bulk, chunk(row, i), 16);
  }
  void get(std::int16_t (*to)[kWgmmaDepth], int rows) const {
    for (int row = 0; row < rows; ++row)
      for (int i = 0; i < kWgmmaDepth; ++i) to[row][i] = static_cast<std::int8_t>(chunk(row, i / 16)[i % 16]);
  }

 private:
  Block& block_;
  const std::uint32_t start_, eight_rows_;
};

// ---- sums -----------------------------------------------------------------------------------------------------------
struct WgmmaOperands {  // of a thread
  int* d;
  int columns;
  const std::uint32_t* a;  // or null
  std::uint64_t a_tile, b_tile;
  bool add;

  bool fits(const WgmmaOperands& other) const {
    return columns == other.columns && !a == !other.a && a_tile == other.a_tile && b_tile == other.b_tile &&
           add == other.add;
  }
};

constexpr int kWgmmaGarbage = 0x5eadbeef;  // in a register that wgmma has

// Body(thread, register) for all.
template <class Body>
void each_sum(const Accumulators& sums, Body body) {
  for (int i = 0; i < kWgmmaThreads; ++i)
    for (int r = 0; r < sums.columns / 2; ++r) body(i, r);
}

inline void check_untouched(const Accumulators& sums) {
  each_sum(sums, [&](int i, int r) {
    if (sums.registers[i][r] != kWgmmaGarbage)
      fail(Fault::misuse, *self, "finds sum ", r, " of thread ", i, " of its warpgroup changed, which wgmma still has");
  });
}

inline Accumulators& accumulators(Warpgroup& group, WgmmaOperands* const* lanes) {
  std::vector<int*> registers;
  for (int i = 0; i < kWgmmaThreads; ++i) registers.push_back(lanes[i]->d);
  for (Accumulators& one : group.accumulators)
    if (one.columns == lanes[0]->columns && one.registers == registers) return one;
  Accumulators fresh;
  fresh.registers = registers, fresh.columns = lanes[0]->columns;
  return group.accumulators.emplace_back(fresh);
}

// Before the first of several wgmma with the same sums. What wgmma gave back and nobody changed it may have again
// without a fence; but sums that it does not add to were surely looked at.
inline void take(Warpgroup& group, Accumulators& sums, bool add) {
  const bool is_new = sums.sums.empty();
  bool changed = !add;
  if (is_new) sums.sums.resize(kWgmmaThreads * sums.columns / 2);
  each_sum(sums, [&](int i, int r) {
    int &kept = sums.sums[i * sums.columns / 2 + r], &given = sums.registers[i][r];
    changed |= kept != given;
    kept = given, given = kWgmmaGarbage;
  });
  if (!group.fenced || (!is_new && changed && !sums.fenced))
    fail(Fault::misuse, *self, "multiplies by wgmma without a wgmma_fence after its sums were touched");
}

inline void multiply(Block& block, Accumulators& sums, const Wgmma& one) {
  std::int16_t a[kWgmmaRows][kWgmmaDepth], b[256][kWgmmaDepth];
  WgmmaTile(block, one.b_tile).get(b, sums.columns);
  if (one.a.empty()) WgmmaTile(block, one.a_tile).get(a, kWgmmaRows);
  for (std::size_t i = 0; i < one.a.size(); ++i) {
    const int thread = i / 4, r = i % 4, row = thread / 32 * 16 + thread % 32 / 4 + r % 2 * 8;
    for (int e = 0; e < 4; ++e) a[row][thread % 4 * 4 + r / 2 * 16 + e] = s8(one.a[i] >> e * 8);
  }
  each_sum(sums, [&](int i, int r) {
    const std::int16_t *const row = a[i / 32 * 16 + i % 32 / 4 + r / 2 % 2 * 8],
                       *const column = b[r / 4 * 8 + i % 4 * 2 + r % 2];
    int sum = 0;
    for (int k = 0; k < kWgmmaDepth; ++k) sum += row[k] * column[k];
    int& to = sums.sums[i * sums.columns / 2 + r];
    to = rounded_sum(one.add ? to : 0, sum);
  });
}

// ---- instructions ---------------------------------------------------------------------------------------------------
inline void wgmma(int* d, int columns, const std::uint32_t* a, std::uint64_t a_tile, std::uint64_t b_tile, bool add) {
  const WgmmaOperands mine{d, columns, a, a_tile, b_tile, add};
  of_warpgroup("wgmma", mine, [](Warpgroup& group, const Thread* threads, WgmmaOperands* const* lanes) {
    Block& block = *self->block;
    const WgmmaOperands& first = *lanes[0];
    for (int i = 1; i < kWgmmaThreads; ++i)
      if (!lanes[i]->fits(first))
        fail(Fault::divergence, threads[i], "is at a wgmma of other operands than thread ", threads[0].id);
    Accumulators& sums = accumulators(group, lanes);
    if (sums.in_flight == 0)
      take(group, sums, first.add);
    else
      check_untouched(sums);
    ++sums.in_flight;
    Wgmma one{std::size_t(&sums - group.accumulators.data()), {}, first.a_tile, first.b_tile, first.add, group.groups};
    for (int i = 0; first.a && i < kWgmmaThreads; ++i) one.a.insert(one.a.end(), lanes[i]->a, lanes[i]->a + 4);
    Stamp stamp;
    stamp.who = Stamp::kWarpgroup + threads[0].id / kWgmmaThreads, stamp.tick = group.groups + 1;
    SharedMemory::Bulk bulk{threads, kWgmmaThreads, stamp, Access::read};
    if (!first.a) WgmmaTile(block, first.a_tile).touch(bulk, kWgmmaRows);
    WgmmaTile(block, first.b_tile).touch(bulk, first.columns);
    if (options.eager) multiply(block, sums, one);
    group.in_flight.push_back(std::move(one));
  });
}

template <std::size_t REGISTERS>
void wgmma(int (&d)[REGISTERS], std::uint64_t a_tile, std::uint64_t b_tile, bool add) {
  wgmma(d, 2 * REGISTERS, nullptr, a_tile, b_tile, add);
}
template <std::size_t REGISTERS>
void wgmma(int (&d)[REGISTERS], const std::uint32_t (&a)[4], std::uint64_t b_tile, bool add) {
  wgmma(d, 2 * REGISTERS, a, 0, b_tile, add);
}

inline void wgmma_fence() {
  of_warpgroup("wgmma_fence", 0, [](Warpgroup& group, auto...) {
    group.fenced = true;
    for (Accumulators& sums : group.accumulators) sums.fenced = true;
  });
}

inline void wgmma_commit() {
  of_warpgroup("wgmma_commit", 0, [](Warpgroup& group, auto...) { ++group.groups; });
}

inline void wgmma_wait(unsigned newest) {
  of_warpgroup("wgmma_wait", newest, [](Warpgroup& group, const Thread* threads, unsigned* const* lanes) {
    Block& block = *self->block;
    const unsigned kept = *lanes[0];
    if (group.groups > kept) group.done = std::max(group.done, group.groups - kept);
    std::size_t finished = 0;
    for (; finished < group.in_flight.size() && group.in_flight[finished].group < group.done; ++finished) {
      const Wgmma& one = group.in_flight[finished];
      Accumulators& sums = group.accumulators[one.accumulators];
      if (!options.eager) multiply(block, sums, one);
      if (--sums.in_flight) continue;
      check_untouched(sums);
      each_sum(sums, [&](int i, int r) { sums.registers[i][r] = sums.sums[i * sums.columns / 2 + r]; });
      sums.fenced = false;
    }
    group.in_flight.erase(group.in_flight.begin(), group.in_flight.begin() + finished);
    if (Clocks* const clocks = block.clocks)
      for (int i = 0; i < kWgmmaThreads; ++i)
        block.row(threads[i])[clocks->async_member(block.rank, threads[0].id / kWgmmaThreads)] = group.done;
  });
}

}  // namespace simt
