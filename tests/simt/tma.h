// TMA: boxes of a matrix in global memory that come to shared memory by themselves.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "barriers.h"

namespace simt {

// Where shared memory begins for the hardware: the first KiB is the system's, since sm_90.
constexpr std::uint32_t kSharedBase = 1024;

inline std::uint32_t shared_address(const void* p) {
  return kSharedBase + static_cast<std::uint32_t>(offset_of(*self->block, p));
}
// 128-byte swizzle: the 16-byte chunk in 128 bytes, exchanged by the number of the 128 bytes in 1024.
constexpr std::uint32_t swizzled(std::uint32_t address) {
  return address ^ (address >> 7 & 7) << 4;
}

struct TensorMap {
  const void* global;
  int rows;
  std::int64_t row_bytes;
  int box_rows, box_bytes;
};

struct Box {
  TensorMap map;
  int byte, row;

  std::size_t bytes() const { return static_cast<std::size_t>(map.box_rows) * map.box_bytes; }
  // body(row of the box, first byte inside the matrix, how many of them, where they are)
  template <class Body>
  void each_row(Body body) const {
    const std::int64_t begin = std::max<std::int64_t>(byte, 0),
                       end = std::min<std::int64_t>(map.row_bytes, std::int64_t(byte) + map.box_bytes);
    for (int i = 0; i < map.box_rows; ++i)
      if (row + i >= 0 && row + i < map.rows && begin < end)
        body(i, begin - byte, end - begin, static_cast<const char*>(map.global) + (row + i) * map.row_bytes + begin);
  }
  void put(unsigned char* to, std::uint32_t address) const {  // `to`, as the hardware calls it
    std::memset(to, 0, bytes());
    each_row([&](int i, std::int64_t first, std::int64_t count, const char* from) {
      for (std::int64_t j = 0; j < count; ++j) {
        const std::uint32_t linear = i * map.box_bytes + static_cast<std::uint32_t>(first + j);
        to[swizzled(address + linear) - address] = from[j];
      }
    });
  }
};

// Fills and signals one block.
inline void tma_load_to(Block& block, std::ptrdiff_t offset, const Box& box, std::ptrdiff_t barrier_offset) {
  constexpr unsigned kAlignment = 128;
  Thread& me = *self;
  Clocks* const clocks = block.cluster.clocks();
  Mbarrier& barrier = mbarrier_at(block, barrier_offset, me);
  if (!barrier.visible) fail(Fault::misuse, me, "loads by TMA without a mbarrier_init_done after mbarrier_init");
  if (offset % kAlignment) fail(Fault::alignment, me, "loads by TMA to shared+", offset);
  const unsigned number = &barrier - block.async.mbarriers.data();
  unsigned char* const to = block.shared() + offset;
  Stamp stamp;
  stamp.who = Stamp::kMbarrier + number, stamp.tick = barrier.phase + 1;
  SharedMemory::Bulk issue{&me, 1, stamp, Access::issue};
  block.memory().touch(issue, to, box.bytes());
  std::memset(to, 0xff, box.bytes());
  const auto arrive = [&block, &me, clocks, box, to, number] {
    Mbarrier& barrier = block.async.mbarriers[number];
    if (!block.alive)
      fail(Fault::lifetime, me, "loads by TMA to block ", block.rank, " of its cluster, which has ended");
    Stamp stamp;
    stamp.who = Stamp::kMbarrier + number, stamp.tick = barrier.phase + 1;
    SharedMemory::Bulk arrival{&me, 1, stamp, Access::arrive};
    block.memory().touch(arrival, to, box.bytes());
    box.put(to, kSharedBase + static_cast<std::uint32_t>(to - block.shared()));
    if (clocks) block.async.visits[clocks->async_member(block.rank, Clocks::mbarrier(number))] = stamp.tick;
    barrier.bytes -= static_cast<std::int64_t>(box.bytes());
    complete_if_done(block, barrier, me);
  };
  if (options.eager)
    arrive();
  else
    block.cluster.in_flight.push_back(arrive);
}

inline void check_box(const Box& box) {
  box.each_row([](int, std::int64_t, std::int64_t count, const char* from) {
    check_global(from, count, 1, Access::read);
  });
}

inline void tma_load(void* shared, const TensorMap& map, int byte, int row, void* barrier) {
  Block& block = *self->block;
  const Box box{map, byte, row};
  check_box(box);
  tma_load_to(block, offset_of(block, shared), box, offset_of(block, barrier));
}

inline void tma_load_multicast(void* shared, const TensorMap& map, int byte, int row, void* barrier,
                               std::uint16_t blocks) {
  const Block& own = *self->block;
  const Box box{map, byte, row};
  check_box(box);
  if (!blocks) fail(Fault::misuse, *self, "loads by TMA to no block at all");
  for (int rank = 0; rank < 16; ++rank)
    if (blocks >> rank & 1)
      tma_load_to(block_of_cluster(rank), offset_of(own, shared), box, offset_of(own, barrier));
}

}  // namespace simt
