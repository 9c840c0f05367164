// append_swa: a warp for each entry, and for each few heads of a token's query, in one launch.
// Architectures: 90a 100f

#include "cache_append.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 4;

template <EntryFormat kFormat, int kHeads>
__global__ void __launch_bounds__(32 * kWarps) AppendSwaKernel(const AppendCall call) {
  AppendTask<kFormat, kHeads>(call, blockIdx.x * kWarps + threadIdx.x / 32);
}

template <EntryFormat kFormat, int kHeads>
ffi::Error Launch(const AppendCall& call, cudaStream_t stream) {
  const int64_t tasks = NumAppendTasks(call, kHeads);
  if (tasks == 0) return ffi::Error::Success();
  const int64_t blocks = (tasks + kWarps - 1) / kWarps;
  AppendSwaKernel<kFormat, kHeads><<<blocks, 32 * kWarps, 0, stream>>>(call);
  return CudaStatus(cudaGetLastError());
}

template <EntryFormat kFormat>
ffi::Error Launch(const AppendCall& call, cudaStream_t stream) {
  // Few heads: a warp each, all at once. Many: two a warp, more bytes in flight.
  constexpr int64_t kFew = 132 * 64;
  const int64_t heads = int64_t{call.batch} * call.num_tokens * call.num_heads;
  return heads <= kFew ? Launch<kFormat, 1>(call, stream) : Launch<kFormat, 2>(call, stream);
}

ffi::Error AppendSwa(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer kv,
                     ffi::AnyBuffer weight, ffi::AnyBuffer start, ffi::AnyBuffer length,
                     ffi::AnyBuffer frequencies, ffi::RemainingArgs planes,
                     ffi::Result<ffi::AnyBuffer> rotated_q, ffi::RemainingRets results,
                     int64_t layer, float eps) {
  AppendCall call;
  DSV4_CHECK(CheckAppend(q, kv, weight, start, length, frequencies, planes.size(), *rotated_q,
                         Buffers(results), layer, eps, &call));
  switch (call.ring.format) {
    case EntryFormat::kDense:
      return Launch<EntryFormat::kDense>(call, stream);
    case EntryFormat::kRecord:
      return Launch<EntryFormat::kRecord>(call, stream);
    default:
      return Launch<EntryFormat::kFloatScale>(call, stream);
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_append_swa, AppendSwa,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets()
                                  .Attr<int64_t>("layer")
                                  .Attr<float>("eps"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
