#include "scratch.h"

#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nunchaku_py::cpu {
namespace {
constexpr std::size_t slack = 256;
constexpr std::size_t huge_page = 2 << 20;
constexpr std::align_val_t aligned{huge_page};  // Fewer pages to look up, and to be handed over at the first touch

void* allocate(std::size_t bytes) {
  void* data = ::operator new(bytes, aligned);
#if defined(__linux__)
  if (bytes >= huge_page) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}
}  // namespace

Scratch::~Scratch() { ::operator delete(data_, aligned); }

void* Scratch::get(std::size_t bytes) {
  if (bytes + slack > size_) {
    ::operator delete(data_, aligned);
    data_ = nullptr;
    size_ = 0;
    data_ = allocate(bytes + slack);
    size_ = bytes + slack;
  }
  return data_;
}

}  // namespace nunchaku_py::cpu
