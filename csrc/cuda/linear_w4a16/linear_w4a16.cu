#include "cuda/arguments.h"
#include "cuda/common/device.cuh"
#include "cuda/common/dispatch.cuh"
#include "cuda/linear_w4a16/kernel.cuh"

namespace nunchaku_py::cuda {
namespace {

template <class T, int ROWS>
void launch_few(const FewRows<T>& p, stream_t stream) {
  const int channels = FEW_WARPS * CHANNELS;
  const dim3 grid{unsigned((p.N + channels - 1) / channels), unsigned((p.M + ROWS - 1) / ROWS)};
  if (p.zeros)
    launch(few_rows_kernel<T, ROWS, false>, grid, FEW_WARPS * 32, 0, stream, p);
  else
    launch(few_rows_kernel<T, ROWS, true>, grid, FEW_WARPS * 32, 0, stream, p);
}

}  // namespace

void linear_w4a16(const FewRowsArguments& a) {
  const OnDevice here(a.where.device);
  with_type(a.type, [&]<class T>(T) {
    const auto typed = [](const void* p) { return static_cast<const T*>(p); };
    const FewRows<T> p = {typed(a.x), a.qw,   typed(a.scales),      typed(a.zeros), a.h,
                          typed(a.up), a.bias, static_cast<T*>(a.y), a.m,            a.n,
                          a.k,         a.r,    a.group};
    const auto stream = static_cast<stream_t>(a.where.stream);
    a.m == 1 ? launch_few<T, 1>(p, stream) : a.m == 2 ? launch_few<T, 2>(p, stream) : launch_few<T, 4>(p, stream);
  });
}

}  // namespace nunchaku_py::cuda
