// nunchaku_py._native: the only file that knows Python. No torch anywhere in csrc: tensors come as pointers and sizes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"  // written by setup.py: what was built, in a sentence
#include "cpu/features.h"
#ifdef NUNCHAKU_PY_WITH_CUDA
#include "cuda/device_info.h"
#endif

#define NUNCHAKU_PY_TEXT_OF(number) #number
#define NUNCHAKU_PY_TEXT(macro) NUNCHAKU_PY_TEXT_OF(macro)
#if defined(_MSC_VER)
#define NUNCHAKU_PY_COMPILER "MSVC " NUNCHAKU_PY_TEXT(_MSC_VER)
#elif defined(__clang__)
#define NUNCHAKU_PY_COMPILER __VERSION__
#else
#define NUNCHAKU_PY_COMPILER "GCC " __VERSION__
#endif

namespace py = pybind11;

namespace {

const char* words(nunchaku_py::cpu::State state) {
  using nunchaku_py::cpu::State;
  switch (state) {
    case State::usable: return "yes";
    case State::not_in_cpu: return "no";
    case State::not_enabled: return "in the CPU, not enabled by the operating system";
    case State::not_permitted: return "in the CPU, not permitted by the operating system";
  }
  return "unknown";
}

py::dict cpu_features() {
  py::dict result;
  for (const auto& feature : nunchaku_py::cpu::features()) result[feature.name] = words(feature.state);
  return result;
}

#ifdef NUNCHAKU_PY_WITH_CUDA
py::list cuda_devices() {
  py::list result;
  for (const auto& device : nunchaku_py::cuda::devices()) {
    py::dict row;
    row["name"] = device.name;
    row["capability"] = py::make_tuple(device.major, device.minor);
    row["memory"] = device.memory;
    row["target"] = device.target;
    row["problem"] = device.problem;
    result.append(row);
  }
  return result;
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The compiled part of nunchaku_py; see nunchaku_py.native.";
  m.attr("compiler") = NUNCHAKU_PY_COMPILER;
  m.attr("cuda_status") = NUNCHAKU_PY_CUDA_STATUS;
  m.attr("cuda_targets") = NUNCHAKU_PY_CUDA_TARGETS;
  m.def("cpu_features", &cpu_features, "instruction set -> 'yes', 'no', or what stands in its way; empty off x86");
#ifdef NUNCHAKU_PY_WITH_CUDA
  m.def("cuda_devices", &cuda_devices, "GPUs of this machine and the compiled target that ran on each");
#endif
}
