// nunchaku_py._native: with bind_cuda.h the only files that know Python. No torch anywhere in csrc: tensors come as
// pointers and sizes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "build_info.h"  // written by setup.py: what was built, in a sentence
#include "cpu/features.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#ifdef NUNCHAKU_PY_WITH_CUDA
#include "bind_cuda.h"
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
    case State::usable:
      return "yes";
    case State::not_in_cpu:
      return "no";
    case State::not_enabled:
      return "in the CPU, not enabled by the operating system";
    case State::not_permitted:
      return "in the CPU, not permitted by the operating system";
  }
  return "unknown";
}

py::dict cpu_features() {
  py::dict result;
  for (const auto& feature : nunchaku_py::cpu::features()) result[feature.name] = words(feature.state);
  return result;
}

using namespace nunchaku_py::cpu;
using Address = std::uintptr_t;
using Operand = std::pair<Address, int>;  // where it is, and its Type

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Array array(const Operand& operand) {
  return {pointer<const void>(operand.first), static_cast<Type>(operand.second)};
}

QuantizeArguments quantize_arguments(Operand x, std::int64_t m, std::int64_t k, Address inv_smooth, Address down,
                                     std::int64_t r, int format, std::int64_t group, float shift, Address qx,
                                     Address sx, Address h, int threads) {
  QuantizeArguments a;
  a.x = array(x), a.m = m, a.k = k, a.r = r, a.threads = threads;
  a.inv_smooth = pointer<const float>(inv_smooth), a.down = pointer<const void>(down);
  a.format = static_cast<Format>(format), a.group = group, a.shift = shift;
  a.qx = pointer<void>(qx), a.sx = pointer<void>(sx), a.h = pointer<float>(h);
  return a;
}

void set_norm(QuantizeArguments& a, int norm, float eps, Operand weight, Operand scale, Operand shift,
              std::int64_t samples) {
  a.norm = static_cast<Norm>(norm), a.eps = eps, a.samples = samples;
  a.norm_weight = array(weight), a.scale = array(scale), a.modulate_shift = array(shift);
}

LinearArguments linear_arguments(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t r, Operand qx, Operand sx,
                                 int act, Address qw, Operand sw, int weight, std::int64_t group, Operand aux,
                                 Address h, Operand up, Operand bias, Operand y, Address row_scales, int threads) {
  LinearArguments a;
  a.m = m, a.n = n, a.k = k, a.r = r, a.threads = threads;
  a.qx = pointer<const void>(qx.first), a.x = static_cast<Type>(qx.second), a.sx = pointer<const void>(sx.first),
  a.act_scales = static_cast<Type>(sx.second);
  a.act = static_cast<Format>(act), a.weight = static_cast<Format>(weight), a.group = group;
  a.qw = pointer<const std::uint8_t>(qw), a.sw = pointer<const void>(sw.first);
  a.weight_scales = static_cast<Type>(sw.second), a.aux = array(aux);
  a.row_scales = pointer<const float>(row_scales);
  a.h = pointer<const float>(h), a.up = array(up), a.bias = array(bias);
  a.y = pointer<void>(y.first), a.out = static_cast<Type>(y.second);
  return a;
}

void set_ending(LinearArguments& a, int ending, int activation, bool gate_first, Operand gate, std::int64_t samples,
                Address residual) {
  a.ending = static_cast<Ending>(ending), a.activation = static_cast<Activation>(activation);
  a.gate_first = gate_first, a.gate = array(gate), a.samples = samples, a.residual = pointer<const void>(residual);
}

void sweep(std::int64_t n, std::int64_t k, Address columns, std::int64_t stride, Address errors,
           std::int64_t error_stride, Address upper, std::int64_t upper_stride, Address step, Address inverse,
           Address group, int format, int threads) {
  if (k > sweep_columns) throw std::invalid_argument("sweep: too many columns for one call");
  SweepArguments a;
  a.n = n, a.k = k, a.columns = pointer<float>(columns), a.stride = stride, a.errors = pointer<float>(errors);
  a.error_stride = error_stride, a.upper = pointer<const float>(upper), a.upper_stride = upper_stride;
  a.step = pointer<const float>(step), a.inverse = pointer<const float>(inverse);
  a.group = pointer<const std::int64_t>(group), a.format = static_cast<Format>(format), a.threads = threads;
  current_isa().engine->sweep(a);
}

void round_rows(std::int64_t n, std::int64_t k, Address r, Operand weight, Address smooth, Address signal,
                Address rounding, int format, std::int64_t group, int scales, Address cost, int threads) {
  RoundArguments a;
  a.n = n, a.k = k, a.r = pointer<float>(r), a.weight = array(weight), a.smooth = pointer<const float>(smooth);
  a.signal = pointer<const float>(signal), a.rounding = pointer<const float>(rounding);
  a.format = static_cast<Format>(format), a.group = group, a.scales = static_cast<Type>(scales);
  a.cost = pointer<double>(cost), a.threads = threads;
  current_isa().engine->round_rows(a);
}

py::list cpu_isas() {
  py::list result;
  for (const auto& isa : isas()) result.append(py::make_tuple(isa.name, isa.obstacle));
  return result;
}

py::dict cpu_peak() {
  const Peak peak = current_isa().engine->peak();
  py::dict result;
  if (peak.int8 > 0) result["int8"] = peak.int8;
  if (peak.bf16 > 0) result["bf16"] = peak.bf16;
  result["fp32"] = peak.fp32;
  return result;
}

void bind_cpu(py::module_& m) {
  py::class_<QuantizeArguments>(m, "QuantizeArguments")
      .def(py::init(&quantize_arguments))
      .def("set_norm", &set_norm)
      .def(
          "run", [](const QuantizeArguments& a) { current_isa().engine->quantize_act(a); },
          py::call_guard<py::gil_scoped_release>());
  py::class_<LinearArguments>(m, "LinearArguments")
      .def(py::init(&linear_arguments))
      .def("set_ending", &set_ending)
      .def(
          "run", [](const LinearArguments& a) { current_isa().engine->linear(a); },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "run_row_scales", [](const LinearArguments& a) { current_isa().engine->row_scales(a); },
          py::call_guard<py::gil_scoped_release>());
  m.def("sweep", &sweep, py::call_guard<py::gil_scoped_release>());
  m.def("round_rows", &round_rows, py::call_guard<py::gil_scoped_release>());
  m.attr("sweep_columns") = sweep_columns;
  m.def("cpu_features", &cpu_features, "instruction set -> 'yes', 'no', or what stands in its way; empty off x86");
  m.def("cpu_isas", &cpu_isas, "(name, why this process cannot use it or '') of every compiled instruction set");
  m.def(
      "cpu_isa", [] { return current_isa().name; }, "the one in use");
  m.def("cpu_peak", &cpu_peak, "what is multiplied -> GOP/s of one thread, all operands in registers");
  m.def("cpu_threading", &threading);
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
  bind_cpu(m);
#ifdef NUNCHAKU_PY_WITH_CUDA
  nunchaku_py::cuda::bind_cuda(m.def_submodule("cuda", "the ops on NVIDIA GPUs"));
  m.def("why_not_this_driver", &nunchaku_py::cuda::why_not_this_driver, "why it runs nothing built here, or ''");
  m.def("cuda_devices", &cuda_devices, "GPUs of this machine and the compiled target that ran on each");
#endif
}
