// Work shared among threads. On Linux they are the threads of PyTorch's own OpenMP runtime, found at run time, so that
// a process has one pool whatever it computes; where there is none, threads live for one call. Nothing is left behind.
#pragma once
#include <cstdint>

namespace nunchaku_py::cpu {

using Item = void (*)(void* context, std::int64_t item);

// Calls run(context, 0 … items−1), each once, on up to `threads` threads, and returns when all are done. Which thread
// takes which item varies from call to call; results must not depend on it.
void parallel_items(int threads, std::int64_t items, Item run, void* context);

template <class Body>
void parallel(int threads, std::int64_t items, const Body& body) {
  parallel_items(
      threads, items, [](void* context, std::int64_t item) { (*static_cast<const Body*>(context))(item); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// "OpenMP of this process" or "threads of each call": what parallel_items uses here.
const char* threading();

}  // namespace nunchaku_py::cpu
