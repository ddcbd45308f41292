// Global memory. A buffer has exact bounds, the alignment of cudaMalloc, and a moat of addresses around it that belong
// to nothing: a wrong index cannot land in another buffer, and a raw pointer past the end faults.
#pragma once
#include <sys/mman.h>

#include <cstring>
#include <vector>

#include "shadow.h"
#include "thread.h"

namespace simt {

constexpr std::size_t kMoat = 64 << 20;

struct Range {
  const char *begin, *end;
  bool writable;
  const char* name;
};
inline std::vector<Range> ranges;

inline const Range* range_near(const char* p) {  // the buffer that p lies in, or in the moat of
  for (const Range& range : ranges)
    if (p >= range.begin - kMoat && p < range.end + kMoat) return &range;
  return nullptr;
}

template <class T>
class Buffer {
 public:
  Buffer(const char* name, std::size_t count, bool writable)
      : size(count), data_(static_cast<T*>(map(count * sizeof(T)))) {
    std::memset(static_cast<void*>(data_), 0xff, count * sizeof(T));
    const char* const begin = reinterpret_cast<char*>(data_);
    ranges.push_back({begin, begin + count * sizeof(T), writable, name});
  }
  ~Buffer() {
    char* const begin = reinterpret_cast<char*>(data_);
    std::erase_if(ranges, [begin](const Range& range) { return range.begin == begin; });
    munmap(begin - kMoat, size * sizeof(T) + 2 * kMoat);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }

  const std::size_t size;

 private:
  static void* map(std::size_t bytes) {
    const int flags = MAP_PRIVATE | MAP_ANON | MAP_NORESERVE;
    void* const all = mmap(nullptr, bytes + 2 * kMoat, PROT_NONE, flags, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    char* const data = static_cast<char*>(all) + kMoat;
    if (mprotect(data, bytes, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
    return data;
  }

  T* const data_;
};

// Every access to global memory passes here.
inline void check_global(const void* address, std::size_t bytes, std::size_t alignment, Access access) {
  const auto* const p = static_cast<const char*>(address);
  const Range* const range = range_near(p);
  const bool inside = range && p >= range->begin && p + bytes <= range->end, write = access != Access::read;
  const bool aligned = reinterpret_cast<std::uintptr_t>(p) % alignment == 0;
  if (inside && aligned && (!write || range->writable)) return;
  const Fault fault = !inside ? Fault::bounds : !aligned ? Fault::alignment : Fault::read_only;
  if (!range) fail(fault, *self, write ? "writes" : "reads", " where no buffer is");
  fail(fault, *self, write ? "writes " : "reads ", bytes, " bytes at byte ", p - range->begin, " of ", range->name,
       ", which has ", range->end - range->begin);
}

}  // namespace simt
