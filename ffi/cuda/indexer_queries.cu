// indexer_queries: a warp for each head of a query.
// Architectures: 90a 100f

#include "indexer_queries.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 4;
__global__ void __launch_bounds__(32 * kWarps) QueriesKernel(const QueriesCall call) {
  PrepareHead(call, int64_t{blockIdx.x} * kWarps + threadIdx.x / 32);
}

ffi::Error IndexerQueries(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer weights,
                          ffi::AnyBuffer positions, ffi::AnyBuffer frequencies,
                          ffi::Result<ffi::AnyBuffer> codes,
                          ffi::Result<ffi::AnyBuffer> scaled_weights, float scale) {
  QueriesCall call;
  DSV4_CHECK(CheckQueries(q, weights, positions, frequencies, *codes, *scaled_weights, scale,
                          &call));
  const int64_t blocks = (call.num_rows * call.num_heads + kWarps - 1) / kWarps;
  if (blocks == 0) return ffi::Error::Success();
  QueriesKernel<<<blocks, 32 * kWarps, 0, stream>>>(call);
  return CudaStatus(cudaGetLastError());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_indexer_queries, IndexerQueries,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
