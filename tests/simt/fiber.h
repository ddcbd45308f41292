// Stacks, and the switch from one to another: by hand on x86-64 (10 ns); elsewhere, or with SIMT_UCONTEXT, by
// swapcontext, which makes a system call (170 ns).
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <new>

#if !defined(__x86_64__) || defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt {

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
struct Context {
  void* sp = nullptr;
};

#ifdef __clang__
#define SIMT_OPAQUE naked, noinline
#else
#define SIMT_OPAQUE naked, noipa  // the optimiser must not conclude anything from the body
#endif

// It ends with ret because jmp would put the CPU's stack of return addresses out of step.
__attribute__((SIMT_OPAQUE)) inline void swap_stacks(void** /*rdi: save*/, void* /*rsi: load*/) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp, (%rdi);"
      "mov %rsi, %rsp; pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

inline void swap(Context& from, Context& to) {
  swap_stacks(&from.sp, to.sp);
}

inline void prepare(Context& context, char* stack, std::size_t size, void (*entry)()) {
  void** const top = reinterpret_cast<void**>(stack + size);
  top[-1] = nullptr;  // entry() finds a return address of 0, and the alignment of a called function
  top[-2] = reinterpret_cast<void*>(entry);
  context.sp = top - 8;  // below: six saved registers of any value
}
#else
struct Context {
  ucontext_t state;
};

inline void swap(Context& from, Context& to) {
  swapcontext(&from.state, &to.state);
}

inline void prepare(Context& context, char* stack, std::size_t size, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack, context.state.uc_stack.ss_size = size;
  makecontext(&context.state, entry, 0);
}
#endif

// `count` stacks, a guard page below each.
class Stacks {
 public:
  explicit Stacks(std::size_t count) : bytes_(count * kSize) {
    void* const base = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(base);
    for (std::size_t i = 0; i < count; ++i) mprotect(base_ + i * kSize, kGuard, PROT_NONE);
  }
  ~Stacks() { munmap(base_, bytes_); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  void start(Context& context, std::size_t i, void (*entry)()) const {
    prepare(context, base_ + i * kSize, kSize, entry);
  }

 private:
  static constexpr std::size_t kSize = 64 << 10, kGuard = 4096;
  const std::size_t bytes_;
  char* base_ = nullptr;
};

}  // namespace simt
