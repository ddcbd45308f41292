#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace nunchaku_py::cpu {
namespace {

struct Queue {
  Item run;
  void* context;
  std::int64_t items;
  std::atomic<std::int64_t> next{0};
  std::mutex failing;
  std::exception_ptr failure;  // the first: an exception must not leave another thread than the caller's

  void work() noexcept {
    try {
      for (std::int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) run(context, item);
    } catch (...) {
      next = items;
      const std::lock_guard lock(failing);
      if (!failure) failure = std::current_exception();
    }
  }
};

void work_of(void* queue) {
  static_cast<Queue*>(queue)->work();
}

// libgomp's entry point of `#pragma omp parallel`, as torch's copy exports it. Linking libgomp instead would bring a
// second runtime, whose threads would fight torch's (which spin for a while after each of its operations).
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel gomp_parallel() {
#if defined(__linux__)
  static std::atomic<GompParallel> found{nullptr};  // absence is not remembered: torch may be imported later
  if (!found) found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
#else
  return nullptr;
#endif
}

void spawn(Queue& queue, int threads) {
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads; i++) others.emplace_back([&queue] { queue.work(); });
  } catch (const std::system_error&) {  // no more threads to be had: those that are there do the work
  }
  queue.work();
  for (auto& other : others) other.join();
}

}  // namespace

void parallel_items(int threads, std::int64_t items, Item run, void* context) {
  Queue queue{run, context, items};
  const int useful = static_cast<int>(std::min<std::int64_t>(threads, items));
  if (useful <= 1)
    queue.work();
  else if (const auto parallel = gomp_parallel())
    parallel(work_of, &queue, static_cast<unsigned>(useful), 0);
  else
    spawn(queue, useful);
  if (queue.failure) std::rethrow_exception(queue.failure);
}

const char* threading() {
  return gomp_parallel() ? "OpenMP of this process" : "threads of each call";
}

}  // namespace nunchaku_py::cpu
