// flush_csa and flush_hca: a block for each sequence and entry, everything in one launch.
// Architectures: 90a 100f

#include <algorithm>

#include "cache_flush.cuh"

namespace dsv4 {
namespace {

template <EntryFormat kFormat>
__global__ void __launch_bounds__(kTeam<kHeadDim>) FlushCsaKernel(const FlushCall call) {
  FlushCsaBlock<kFormat>(call, blockIdx.x, blockIdx.y, blockIdx.z);
}

template <EntryFormat kFormat, int kTeams>
__global__ void __launch_bounds__(kTeams * kTeam<kHeadDim>) FlushHcaKernel(const FlushCall call) {
  FlushHcaBlock<kFormat, kTeams>(call, blockIdx.x, blockIdx.y);
}

template <EntryFormat kFormat>
ffi::Error LaunchCsa(const FlushCall& call, cudaStream_t stream) {
  const dim3 grid(std::max(call.max_entries() - 1, 1), call.batch, 2);
  FlushCsaKernel<kFormat><<<grid, kTeam<kHeadDim>, 0, stream>>>(call);
  return CudaStatus(cudaGetLastError());
}

template <EntryFormat kFormat>
ffi::Error LaunchHca(const FlushCall& call, cudaStream_t stream) {
  const int touched = (call.num_tokens + kRunningRatio - 2) / kRunningRatio + 1;
  const dim3 grid(std::max(touched - 1, 1), call.batch);
  if (call.num_tokens <= kFewTokens) {
    FlushHcaKernel<kFormat, 1><<<grid, kTeam<kHeadDim>, 0, stream>>>(call);
  } else {
    FlushHcaKernel<kFormat, kManyTeams><<<grid, kManyTeams * kTeam<kHeadDim>, 0, stream>>>(call);
  }
  return CudaStatus(cudaGetLastError());
}

ffi::Error FlushCsa(cudaStream_t stream, ffi::AnyBuffer block_table, ffi::AnyBuffer start,
                    ffi::AnyBuffer length, ffi::AnyBuffer frequencies,
                    ffi::RemainingArgs operands, ffi::RemainingRets results, int64_t layer,
                    float eps) {
  FlushCall call;
  DSV4_CHECK(CheckFlush(block_table, start, length, frequencies, Buffers(operands),
                        Buffers(results), layer, eps, {kHeadDim, kKeyDim}, true, &call));
  if (call.batch == 0 || call.num_tokens == 0) return ffi::Error::Success();
  switch (call.streams[0].pool.format) {
    case EntryFormat::kDense:
      return LaunchCsa<EntryFormat::kDense>(call, stream);
    case EntryFormat::kRecord:
      return LaunchCsa<EntryFormat::kRecord>(call, stream);
    default:
      return LaunchCsa<EntryFormat::kFloatScale>(call, stream);
  }
}

ffi::Error FlushHca(cudaStream_t stream, ffi::AnyBuffer block_table, ffi::AnyBuffer start,
                    ffi::AnyBuffer length, ffi::AnyBuffer frequencies,
                    ffi::RemainingArgs operands, ffi::RemainingRets results, int64_t layer,
                    float eps) {
  FlushCall call;
  DSV4_CHECK(CheckFlush(block_table, start, length, frequencies, Buffers(operands),
                        Buffers(results), layer, eps, {kHeadDim}, false, &call));
  if (call.batch == 0 || call.num_tokens == 0) return ffi::Error::Success();
  switch (call.streams[0].pool.format) {
    case EntryFormat::kDense:
      return LaunchHca<EntryFormat::kDense>(call, stream);
    case EntryFormat::kRecord:
      return LaunchHca<EntryFormat::kRecord>(call, stream);
    default:
      return LaunchHca<EntryFormat::kFloatScale>(call, stream);
  }
}

}  // namespace

#define DSV4_FLUSH_BINDING                      \
  ffi::Ffi::Bind()                              \
      .Ctx<ffi::PlatformStream<cudaStream_t>>() \
      .Arg<ffi::AnyBuffer>()                    \
      .Arg<ffi::AnyBuffer>()                    \
      .Arg<ffi::AnyBuffer>()                    \
      .Arg<ffi::AnyBuffer>()                    \
      .RemainingArgs()                          \
      .RemainingRets()                          \
      .Attr<int64_t>("layer")                   \
      .Attr<float>("eps")

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_flush_csa, FlushCsa, DSV4_FLUSH_BINDING,
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_flush_hca, FlushHca, DSV4_FLUSH_BINDING,
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
