#include "scratch.h"

#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nunchaku_py::cpu {
namespace {
constexpr std::size_t slack = 256;
constexpr std::size_t huge_page = 2 << 20;

// Large blocks are aligned to large pages: fewer to look up, and to be handed over at the first touch.
std::align_val_t alignment(std::size_t bytes) {
  return std::align_val_t{bytes < huge_page ? 64 : huge_page};
}

void* allocate(std::size_t bytes) {
  void* data = ::operator new(bytes, alignment(bytes));
#if defined(__linux__)
  if (bytes >= huge_page) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}
}  // namespace

Scratch::~Scratch() {
  ::operator delete(data_, alignment(size_));
}

void* Scratch::get(std::size_t bytes) {
  if (bytes + slack > size_) {
    ::operator delete(data_, alignment(size_));
    data_ = nullptr;
    size_ = 0;
    data_ = allocate(bytes + slack);
    size_ = bytes + slack;
  }
  return data_;
}

}  // namespace nunchaku_py::cpu
