#include "cuda/arguments.h"
#include "cuda/common/device.cuh"
#include "cuda/common/dispatch.cuh"
#include "cuda/linear_w4a8/expand.cuh"

namespace nunchaku_py::cuda {
namespace {

template <class Weight>
void launch_expand(const ExpandArguments& a) {
  const ExpandParams p = {a.qw, a.sw, a.row_scales, a.channel_scales, static_cast<int8_t*>(a.w8), a.n, a.k, a.group};
  const int64_t threads = int64_t(a.n) * (a.k / EXPANDED);
  launch(expand_kernel<Weight>, dim3{unsigned((threads + EXPANDING_THREADS - 1) / EXPANDING_THREADS)},
         EXPANDING_THREADS, 0, static_cast<stream_t>(a.where.stream), p);
}

}  // namespace

void expand_int8(const ExpandArguments& a) {
  const OnDevice here(a.where.device);
  if (a.codes == Codes::nvfp4) return launch_expand<Nvfp4Weight>(a);
  with_type(a.type, [&]<class T>(T) { launch_expand<Int4Weight<T>>(a); });
}

}  // namespace nunchaku_py::cuda
