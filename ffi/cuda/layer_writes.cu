// layer_writes: everything that a layer writes for a few tokens, and its indexer's queries, in one
// launch.
// Architectures: 90a 100f

#include "cache_append.cuh"
#include "cache_flush.cuh"
#include "dsv4/layer_writes.h"
#include "indexer_queries.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = kTeam<kHeadDim>, kWarps = kThreads / 32;

// Blocks of flushes, which take longest, then of entries and queries, then of the indexer's.
struct Shares {
  int flush, append;
};

template <EntryFormat kFormat, bool kOverlapping, int kHeads>
__global__ void __launch_bounds__(kThreads, 2) WritesKernel(const WritesCall call,
                                                            const Shares shares) {
  int block = blockIdx.x;
  const int warp = threadIdx.x / 32;
  if (block < shares.flush) {
    if constexpr (kOverlapping) {
      return FlushCsaBlock<kFormat>(call.flush, 0, block / 2, block % 2);
    } else {
      return FlushHcaBlock<kFormat, 1>(call.flush, 0, block);
    }
  }
  block -= shares.flush;
  if (block < shares.append) return AppendTask<kFormat, kHeads>(call.append, block * kWarps + warp);
  block -= shares.append;
  PrepareHead(call.queries, int64_t{block} * kWarps + warp);
}

template <EntryFormat kFormat, bool kOverlapping, int kHeads>
ffi::Error Launch(const WritesCall& call, cudaStream_t stream) {
  const auto blocks = [](int64_t tasks) { return static_cast<int>((tasks + kWarps - 1) / kWarps); };
  Shares shares;
  shares.flush = call.flush.batch * (kOverlapping ? 2 : 1);
  shares.append = blocks(NumAppendTasks(call.append, kHeads));
  const int queries = blocks(call.queries.num_rows * call.queries.num_heads);
  const int grid = shares.flush + shares.append + queries;
  WritesKernel<kFormat, kOverlapping, kHeads><<<grid, kThreads, 0, stream>>>(call, shares);
  return CudaStatus(cudaGetLastError());
}

template <EntryFormat kFormat, bool kOverlapping>
ffi::Error Launch(const WritesCall& call, cudaStream_t stream) {
  // Few heads: a warp each, all at once. Many: two a warp, more bytes in flight.
  constexpr int64_t kFew = 132 * 16;
  const int64_t heads =
      int64_t{call.append.batch} * call.append.num_tokens * call.append.num_heads;
  return heads <= kFew ? Launch<kFormat, kOverlapping, 1>(call, stream)
                       : Launch<kFormat, kOverlapping, 2>(call, stream);
}

template <EntryFormat kFormat>
ffi::Error Launch(const WritesCall& call, cudaStream_t stream) {
  return call.overlapping ? Launch<kFormat, true>(call, stream)
                          : Launch<kFormat, false>(call, stream);
}

ffi::Error LayerWrites(cudaStream_t stream, ffi::RemainingArgs arguments,
                       ffi::RemainingRets results, int64_t num_planes, int64_t num_streams,
                       int64_t layer, int64_t pool_layer, float eps, float query_scale) {
  WritesCall call;
  DSV4_CHECK(CheckWrites(arguments, results, num_planes, num_streams, layer, pool_layer, eps,
                         query_scale, &call));
  if (call.append.batch == 0 || call.append.num_tokens == 0) return ffi::Error::Success();
  switch (call.append.ring.format) {
    case EntryFormat::kDense:
      return Launch<EntryFormat::kDense>(call, stream);
    case EntryFormat::kRecord:
      return Launch<EntryFormat::kRecord>(call, stream);
    default:
      return Launch<EntryFormat::kFloatScale>(call, stream);
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_layer_writes, LayerWrites,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("num_planes")
                                  .Attr<int64_t>("num_streams")
                                  .Attr<int64_t>("layer")
                                  .Attr<int64_t>("pool_layer")
                                  .Attr<float>("eps")
                                  .Attr<float>("query_scale"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
