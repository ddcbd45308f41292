#include "cuda/arguments.h"
#include "cuda/common/device.cuh"
#include "cuda/common/dispatch.cuh"
#include "cuda/linear_w4a16/config.h"
#include "cuda/linear_w4a16/few_rows.cuh"
#include "cuda/linear_w4a16/many_rows.cuh"

namespace nunchaku_py::cuda {
namespace {

unsigned pieces_of(int size, int piece) {
  return unsigned((size + piece - 1) / piece);
}

template <class T, int ROWS>
void launch_few(const Decoded<T>& p, stream_t stream) {
  const dim3 grid{pieces_of(p.M, ROWS), pieces_of(p.N, FEW_WARPS * CHANNELS)};
  launch(p.zeros ? few_rows_kernel<T, ROWS, false> : few_rows_kernel<T, ROWS, true>, grid, FEW_WARPS * 32, 0, stream,
         p);
}

template <class T>
void launch_many(const Decoded<T>& p, stream_t stream) {
  const dim3 grid{pieces_of(p.M, ManyTile::BM), pieces_of(p.N, ManyTile::BN)};
  launch(p.zeros ? many_rows_kernel<T, false> : many_rows_kernel<T, true>, grid, ManyTile::THREADS, many_rows_bytes(),
         stream, p);
}

}  // namespace

void linear_w4a16(const DecodedArguments& a) {
  const OnDevice here(a.where.device);
  with_type(a.type, [&]<class T>(T) {
    const auto typed = [](const void* p) { return static_cast<const T*>(p); };
    const Decoded<T> p = {typed(a.x),  a.qw,   typed(a.scales),      typed(a.zeros), a.h,
                          typed(a.up), a.bias, static_cast<T*>(a.y), a.m,            a.n,
                          a.k,         a.r,    a.group};
    const auto stream = static_cast<stream_t>(a.where.stream);
    if (has_many_rows(a.m, a.n, a.r, a.type == Type::bf16, gpu(a.where.device).capability))
      return launch_many(p, stream);
    a.m == 1 ? launch_few<T, 1>(p, stream) : a.m == 2 ? launch_few<T, 2>(p, stream) : launch_few<T, 4>(p, stream);
  });
}

}  // namespace nunchaku_py::cuda
