// What threads of a warp do together, or a thread with itself later on: warp instructions, shuffles, cp.async.
#pragma once
#include <cstdint>
#include <cstring>

#include "cluster.h"

namespace simt {

// A warp instruction. The last lane of the mask to arrive executes it for all, with the operands of each lane (null for
// lanes outside the mask). No lockstep is needed, and lanes that went elsewhere show by themselves.
template <class Operands, class Execute>
void collective(const char* name, std::uint32_t mask, Operands mine, Execute execute) {
  Thread& me = *self;
  Warp& warp = me.block->warp(me);
  static constexpr char instruction = 0;  // its address tells one instruction from another
  mask &= warp.lanes;
  me.at = name, me.place = 0, me.instruction = &instruction, me.operands = &mine, me.mask = mask;
  if (!(mask & me.bit())) fail(Fault::divergence, me, "is at ", name, ", outside its mask");
  warp.waiting |= me.bit();
  if ((warp.waiting & mask) != mask) return me.block->wait(me);
  Operands* lanes[32] = {};
  for (std::uint32_t rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const Thread& other = me.block->threads[(me.id & ~31u) + lane];
    if (other.mask != mask || other.instruction != &instruction)
      fail(Fault::divergence, me, "is at ", name, ", lane ", lane, " at ", other.at);
    lanes[lane] = static_cast<Operands*>(other.operands);
  }
  execute(lanes);
  warp.waiting &= ~mask, warp.ready |= mask;
}

// For instructions that are .aligned: all 32 lanes have to be there.
template <class Operands, class Execute>
void collective_of_all(const char* name, Operands mine, Execute execute) {
  if (self->block->warp(*self).lanes != ~0u)
    fail(Fault::divergence, *self, "is at ", name, " in a warp of fewer lanes");
  collective(name, ~0u, mine, execute);
}

// A partial mask orders the whole warp all the same: at worst a race goes unseen.
inline void sync_warp(std::uint32_t mask) {
  collective("__syncwarp", mask, 0, [](auto) { self->block->warp_barrier(*self); });
}

// Every lane takes the value of lane `from` of its own choice.
template <class T>
T shuffle(const char* name, std::uint32_t mask, T value, int from) {
  struct Lane {
    T* value;
    int from;
  };
  collective(name, mask, Lane{&value, from}, [name](Lane* const* lanes) {
    T taken[32];
    for (int i = 0; i < 32; ++i) {
      if (!lanes[i]) continue;
      if (!lanes[lanes[i]->from])
        fail(Fault::divergence, *self, "is at ", name, ": lane ", i, " takes from lane ", lanes[i]->from,
             ", which is outside the mask");
      taken[i] = *lanes[lanes[i]->from]->value;
    }
    for (int i = 0; i < 32; ++i)
      if (lanes[i]) *lanes[i]->value = taken[i];
  });
  return value;
}

// The lanes of one's own segment of `width` lanes, a power of two.
struct Segment {
  explicit Segment(int width) : own(self->id % 32), first(own & -width), last(first + width - 1) {}
  int clamp(int lane) const { return lane <= last ? lane : own; }  // beyond the segment: one's own value
  int own, first, last;
};

// ---- shared memory, directly and by cp.async ------------------------------------------------------------------------
inline void touch_shared(const void* p, std::size_t bytes, Access access) {
  self->block->touch(*self, p, bytes, access);
}

// `bytes` of `size` are read, the others become zero.
inline void copy_async(void* shared, const void* global, unsigned size, int bytes) {
  if (bytes < 0 || bytes > static_cast<int>(size))
    fail(Fault::bounds, *self, "copies ", bytes, " of ", size, " bytes by cp.async");
  if (bytes) check_global(global, bytes, size, Access::read);
  touch_shared(shared, size, Access::issue);
  self->copies.push_back({static_cast<unsigned char*>(shared), {}, size, self->groups});
  if (bytes) std::memcpy(self->copies.back().data, global, bytes);
  std::memset(shared, 0xff, size);
}

inline void wait_async(unsigned newest) {
  std::erase_if(self->copies, [newest](const Copy& copy) {
    if (copy.group + newest >= self->groups) return false;
    touch_shared(copy.to, copy.size, Access::arrive);  // written only now: others need a barrier after this
    std::memcpy(copy.to, copy.data, copy.size);
    return true;
  });
}

// ---- global memory that several blocks change -----------------------------------------------------------------------
inline void atomic_max(int* global, int value) {
  const std::atomic_ref<int> place(*global);
  for (int found = place; found < value && !place.compare_exchange_weak(found, value);) continue;
}

}  // namespace simt
