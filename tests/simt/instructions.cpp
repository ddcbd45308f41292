// The probes for test_instructions.py.
#include "call.h"
#include "probes.cuh"

using namespace nunchaku_py::cuda;
using simt::Array, simt::Call, simt::Input, simt::Output;

template <class Instruction>
const char* run_mma(Call& call, Array a, Array b, Array c, int start) {
  return simt::run(call, [&] {
    const Input<uint32_t> in_a("a", a), in_b("b", b);
    const Output<typename Instruction::Sum> in_out_c("c", c);
    launch(mma_probe<Instruction>, 1, 32, 0, nullptr, in_a.data(), in_b.data(), in_out_c.data(), start);
  });
}
#define EXPORT_MMA(name, ...)                                                      \
  SIMT_EXPORT const char* name(Call& call, Array a, Array b, Array c, int start) { \
    return run_mma<probe_##name>(call, a, b, c, start);                            \
  }
namespace exported {  // beside the wrappers of the same names
FOR_EACH_MMA(EXPORT_MMA)
EXPORT_MMA(mma_m16n8k64_nvf4)
EXPORT_MMA(mma_m16n8k64_nvf4_selected)
}  // namespace exported

SIMT_EXPORT const char* ldmatrix(Call& call, Array in, Array x4, Array x2, Array x1) {
  return simt::run(call, [&] {
    const Input<uint4> rows("in", in);
    const Output<uint32_t> out4("x4", x4), out2("x2", x2), out1("x1", x1);
    launch(ldmatrix_probe, 1, 32, 512, nullptr, rows.data(), out4.data(), out2.data(), out1.data());
  });
}

SIMT_EXPORT const char* copy(Call& call, Array in, Array counts, Array out16, Array out8, Array out4) {
  return simt::run(call, [&] {
    const Input<uint4> from("in", in);
    const Input<int> n("counts", counts);
    const Output<uint4> to16("out16", out16);
    const Output<uint2> to8("out8", out8);
    const Output<uint32_t> to4("out4", out4);
    launch(copy_probe, 1, 32, 1024, nullptr, from.data(), n.data(), to16.data(), to8.data(), to4.data());
  });
}

static dim3 blocks(size_t n) {
  return (static_cast<unsigned>(n) + 127) / 128;
}

SIMT_EXPORT const char* narrow(Call& call, Array in, Array bf16s, Array f16s, Array singles, Array e2m1, Array e4m3s) {
  return simt::run(call, [&] {
    const Input<float> from("in", in);
    const Output<uint32_t> bf("bf16s", bf16s), f("f16s", f16s), one("singles", singles), four("e2m1", e2m1),
        eight("e4m3s", e4m3s);
    launch(narrow_probe, blocks(from.size), 128, 0, nullptr, from.data(), bf.data(), f.data(), one.data(), four.data(),
           eight.data(), from.size);
  });
}

SIMT_EXPORT const char* widen(Call& call, Array in, Array out) {
  return simt::run(call, [&] {
    const Input<uint32_t> from("in", in);
    const Output<float> to("out", out);
    launch(widen_probe, blocks(from.size), 128, 0, nullptr, from.data(), to.data(), from.size);
  });
}

template <class T>
const char* run_shuffle(Call& call, Array in, Array by, Array out) {
  return simt::run(call, [&] {
    const Input<T> from("in", in);
    const Input<int> lanes("by", by);
    const Output<T> to("out", out);
    launch(shuffle_probe<T>, 1, 32, 0, nullptr, from.data(), lanes.data(), to.data());
  });
}
SIMT_EXPORT const char* shuffle_float(Call& call, Array in, Array by, Array out) {
  return run_shuffle<float>(call, in, by, out);
}
SIMT_EXPORT const char* shuffle_int(Call& call, Array in, Array by, Array out) {
  return run_shuffle<int>(call, in, by, out);
}
SIMT_EXPORT const char* shuffle_uint32(Call& call, Array in, Array by, Array out) {
  return run_shuffle<uint32_t>(call, in, by, out);
}

SIMT_EXPORT const char* approx(Call& call, Array in, Array out) {
  return simt::run(call, [&] {
    const Input<float> from("in", in);
    const Output<float> to("out", out);
    launch(approx_probe, blocks(from.size), 128, 0, nullptr, from.data(), to.data(), from.size);
  });
}
