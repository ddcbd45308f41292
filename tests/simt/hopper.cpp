// Hopper's instructions for test_hopper.py.
#include "hopper.cuh"

#include "call.h"

using namespace nunchaku_py::cuda;
using simt::Array, simt::Call, simt::Input, simt::Output;

SIMT_EXPORT const char* box(Call& call, Array matrix, Array out, int rows, int row_bytes, int byte, int row,
                            int box_rows, int cluster) {
  return simt::run(call, [&] {
    const Input<uint8_t> from("matrix", matrix);
    const Output<uint4> to("out", out);
    const BoxParams p{tensor_map(from.data(), rows, row_bytes, box_rows / cluster, BOX_BYTES), to.data(), byte, row,
                      box_rows};
    const size_t bytes = box_rows * BOX_BYTES + sizeof(Barrier);
    launch_cluster(cluster, box_probe<BoxParams>, cluster, WARPGROUP, bytes, nullptr, p);
  });
}

template <int N>
void run_wgmma(const WgmmaParams& p) {
  const size_t bytes = (64 + N) * BOX_BYTES + sizeof(Barrier);
  launch(p.a_codes ? wgmma_probe<N, true> : wgmma_probe<N, false>, 1, WARPGROUP, bytes, nullptr, p);
}

// `a_codes`: A as fragments, or empty.
SIMT_EXPORT const char* wgmma(Call& call, Array a, Array b, Array a_codes, Array d, int rows_a, int n, int k, int add) {
  return simt::run(call, [&] {
    const Input<uint8_t> in_a("a", a), in_b("b", b);
    const Input<uint32_t> fragments("a_codes", a_codes);
    const Output<int> sums("d", d);
    const WgmmaParams p{tensor_map(in_a.data(), rows_a, k, 64, BOX_BYTES),
                        tensor_map(in_b.data(), n, k, n, BOX_BYTES),
                        a_codes.bytes ? fragments.data() : nullptr,
                        sums.data(),
                        k,
                        add != 0};
    switch (n) {
      case 64:
        return run_wgmma<64>(p);
      case 96:
        return run_wgmma<96>(p);
      case 128:
        return run_wgmma<128>(p);
      case 160:
        return run_wgmma<160>(p);
      case 192:
        return run_wgmma<192>(p);
      case 224:
        return run_wgmma<224>(p);
      case 256:
        return run_wgmma<256>(p);
    }
    throw simt::Error("no wgmma has " + std::to_string(n) + " columns here");
  });
}

SIMT_EXPORT const char* empty_clusters(Call& call, int blocks, int cluster) {
  return simt::run(call, [&] { launch_cluster(cluster, +[] { cluster_sync(); }, blocks, 32, 0, nullptr); });
}
