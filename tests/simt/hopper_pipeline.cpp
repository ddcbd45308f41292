// The GEMM in Hopper's manner, with the mistake that is asked for, for test_hopper_pipeline.py.
#include "hopper_pipeline.cuh"

#include "call.h"

using namespace nunchaku_py::cuda;
using simt::Array, simt::Call, simt::Input, simt::Output;

SIMT_EXPORT const char* pipeline(Call& call, const char* bug, Array a, Array b, Array out, int m, int n, int k,
                                 int cluster) {
  return simt::run(call, [&] {
    const Input<uint8_t> in_a("a", a), in_b("b", b);
    const Output<int> y("out", out);
    launch_pipeline({in_a.data(), in_b.data(), y.data(), m, n, k}, cluster, bug_called(bug), nullptr);
  });
}
