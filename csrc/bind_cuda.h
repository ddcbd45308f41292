// The CUDA ops for Python: the other half of module.cpp, apart so that tests can bind kernels that run on the host.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/arguments.h"

namespace nunchaku_py::cuda {

namespace py = pybind11;
using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Where where(int device, Address stream) {
  return {device, at<void>(stream)};
}

inline QuantizeArguments quantize_arguments(int device, Address stream, int type, int m, int k, int r, Address x,
                                            Address inv_smooth, Address down, int codes, float shift, Address qx,
                                            Address sx, Address h) {
  QuantizeArguments a;
  a.where = where(device, stream), a.type = Type(type), a.m = m, a.k = k, a.r = r;
  a.x = at<void>(x), a.inv_smooth = at<float>(inv_smooth), a.down = at<void>(down);
  a.codes = Codes(codes), a.shift = shift;
  a.qx = at<std::uint8_t>(qx), a.sx = at<void>(sx), a.h = at<float>(h);
  return a;
}

inline void set_norm(QuantizeArguments& a, int norm, float eps, Address weight, Address scale, Address shift,
                     int samples) {
  a.norm = Norm(norm), a.eps = eps, a.samples = samples;
  a.norm_weight = at<void>(weight), a.scale = at<void>(scale), a.modulate_shift = at<void>(shift);
}

inline LinearArguments linear_arguments(int device, Address stream, int type, int m, int n, int k, int r, Address qx,
                                        Address sx, int codes, Address qw, Address sw, Address channel_scales,
                                        Address h, Address up, Address bias) {
  LinearArguments a;
  a.where = where(device, stream), a.type = Type(type), a.m = m, a.n = n, a.k = k, a.r = r;
  a.codes = Codes(codes), a.qx = at<std::uint8_t>(qx), a.sx = at<void>(sx);
  a.qw = at<std::uint8_t>(qw), a.sw = at<void>(sw), a.channel_scales = at<float>(channel_scales);
  a.h = at<float>(h), a.up = at<void>(up), a.bias = at<float>(bias);
  return a;
}

inline ExpandArguments expand_arguments(int device, Address stream, int type, int codes, int n, int k, int group,
                                        Address qw, Address sw, Address row_scales, Address channel_scales,
                                        Address w8) {
  ExpandArguments a;
  a.where = where(device, stream), a.type = Type(type), a.codes = Codes(codes), a.n = n, a.k = k, a.group = group;
  a.qw = at<std::uint8_t>(qw), a.sw = at<void>(sw), a.w8 = at<void>(w8);
  a.row_scales = at<float>(row_scales), a.channel_scales = at<float>(channel_scales);
  return a;
}

inline StoreArguments store_arguments(Address y) {
  return {at<void>(y)};
}

inline GateResidualArguments gate_residual_arguments(Address gate, Address residual, int samples, Address y) {
  return {at<void>(gate), at<void>(residual), samples, at<void>(y)};
}

inline QkvRopeArguments qkv_rope_arguments(Address q_norm, Address k_norm, Address rotary, int head_dim, int tokens,
                                           float eps, Address q, Address k, Address v) {
  return {at<float>(q_norm), at<float>(k_norm), at<float>(rotary), head_dim, tokens, eps,
          at<void>(q),       at<void>(k),       at<void>(v)};
}

inline NextArguments next_arguments(int activation, bool gate_first, int codes, float shift, Address inv_smooth,
                                    Address down, int r, Address qx, Address sx, Address h) {
  NextArguments to;
  to.activation = Activation(activation), to.gate_first = gate_first, to.codes = Codes(codes), to.shift = shift;
  to.inv_smooth = at<float>(inv_smooth), to.down = at<void>(down), to.r = r;
  to.qx = at<std::uint8_t>(qx), to.sx = at<void>(sx), to.h = at<float>(h);
  return to;
}

inline void set_parts(NextArguments& to, Address parts) {
  to.parts = at<float>(parts);
}

inline void set_activated(NextArguments& to, Address z, Address tops) {
  to.z = at<void>(z), to.tops = at<float>(tops);
}

inline DecodedArguments decoded_arguments(int device, Address stream, int type, int m, int n, int k, int r, int group,
                                          Address x, Address qw, Address scales, Address zeros, Address h, Address up,
                                          Address bias, Address y) {
  DecodedArguments a;
  a.where = where(device, stream), a.type = Type(type), a.m = m, a.n = n, a.k = k, a.r = r, a.group = group;
  a.x = at<void>(x), a.qw = at<std::uint8_t>(qw), a.scales = at<void>(scales), a.zeros = at<void>(zeros);
  a.h = at<float>(h), a.up = at<void>(up), a.bias = at<float>(bias), a.y = at<void>(y);
  return a;
}

using Sizes = std::vector<std::pair<int, int>>;

inline std::vector<Problem> problems(const Sizes& sizes) {
  std::vector<Problem> found;
  for (const auto& [m, n] : sizes) found.push_back({m, n});
  return found;
}

inline void bind_cuda(py::module_ m) {
  using Free = py::call_guard<py::gil_scoped_release>;
  const py::module_local local;  // tests have both the native module and the kernels of the host
  py::class_<QuantizeArguments>(m, "QuantizeArguments", local)
      .def(py::init(&quantize_arguments))
      .def("set_norm", &set_norm);
  py::class_<LinearArguments>(m, "LinearArguments", local).def(py::init(&linear_arguments));
  py::class_<ExpandArguments>(m, "ExpandArguments", local).def(py::init(&expand_arguments));
  py::class_<StoreArguments>(m, "StoreArguments", local).def(py::init(&store_arguments));
  py::class_<GateResidualArguments>(m, "GateResidualArguments", local).def(py::init(&gate_residual_arguments));
  py::class_<QkvRopeArguments>(m, "QkvRopeArguments", local).def(py::init(&qkv_rope_arguments));
  py::class_<NextArguments>(m, "NextArguments", local)
      .def(py::init(&next_arguments))
      .def("set_parts", &set_parts)
      .def("set_activated", &set_activated);
  py::class_<DecodedArguments>(m, "DecodedArguments", local).def(py::init(&decoded_arguments));
  m.def("expand_int8", &expand_int8, Free());
  m.def("linear_w4a16", &linear_w4a16, Free());
  m.def("quantize_act", &quantize_act, Free());
  m.def("norm_modulate_quantize", &norm_modulate_quantize, Free());
  m.def("linear_w4a4", &linear_w4a4, Free());
  m.def("linear_w4a4_gate_residual", &linear_w4a4_gate_residual, Free());
  m.def("linear_w4a4_qkv_rope", &linear_w4a4_qkv_rope, Free());
  m.def("linear_w4a4_gelu_quantize", &linear_w4a4_gelu_quantize, Free());
  m.def("linear_w4a4_glu_quantize", &linear_w4a4_glu_quantize, Free());
  m.def("linear_w4a8", &linear_w4a8, Free());
  m.def("linear_w4a8_gate_residual", &linear_w4a8_gate_residual, Free());
  m.def("linear_w4a8_qkv_rope", &linear_w4a8_qkv_rope, Free());
  m.def("linear_w4a8_gelu_quantize", &linear_w4a8_gelu_quantize, Free());
  m.def("linear_w4a8_glu_quantize", &linear_w4a8_glu_quantize, Free());
  m.def(
      "gelu_parts", [](int device, const Sizes& sizes) { return gelu_parts(device, problems(sizes)); },
      "(device, [(m, n)]) -> parts of h that linear_w4a4_gelu_quantize leaves of each");
  m.def(
      "glu_parts", [](int device, const Sizes& sizes) { return glu_parts(device, problems(sizes)); },
      "(device, [(m, n)]) -> parts of h that linear_w4a4_glu_quantize leaves of each");
}

}  // namespace nunchaku_py::cuda
