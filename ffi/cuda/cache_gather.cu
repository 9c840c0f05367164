// gather_kv: a warp for each entry.
// Architectures: 90a 100f

#include "cache_load.cuh"
#include "dsv4/cache_gather.h"

namespace dsv4 {
namespace {

constexpr int kWarps = 8, kLaneChannels = 8, kHalf = kHeadDim / 2;

template <EntryFormat kFormat>
__global__ void __launch_bounds__(32 * kWarps) GatherKvKernel(const GatherCall call) {
  const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (index >= call.num_entries) return;
  const int lane = threadIdx.x % 32;
  const int32_t* blocks = call.block_table + index / call.per_sequence * call.table_width;
  const int64_t row = EntryRow(blocks, call.table_width, call.layer, call.num_blocks,
                               call.per_block, call.ids[index]);
  uint4 low = {}, high = {};
  if (row >= 0) {
    const uint8_t* body = call.pool.body + row * BodyBytes(kFormat, kHeadDim);
    const uint8_t* scales = call.pool.scales + row * ScaleBytes(kFormat, kHeadDim);
    low = LoadChannels<kFormat>(body, scales, kLaneChannels * lane);
    high = LoadChannels<kFormat>(body, scales, kHalf + kLaneChannels * lane);
  }
  uint4* out = reinterpret_cast<uint4*>(call.out + index * kHeadDim) + lane;
  out[0] = low;
  out[32] = high;
}

template <EntryFormat kFormat>
ffi::Error Launch(const GatherCall& call, cudaStream_t stream) {
  const int64_t blocks = (call.num_entries + kWarps - 1) / kWarps;
  if (blocks == 0) return ffi::Error::Success();
  GatherKvKernel<kFormat><<<blocks, 32 * kWarps, 0, stream>>>(call);
  return CudaStatus(cudaGetLastError());
}

ffi::Error GatherKv(cudaStream_t stream, ffi::AnyBuffer block_table, ffi::AnyBuffer ids,
                    ffi::RemainingArgs planes, ffi::Result<ffi::AnyBuffer> out, int64_t layer) {
  GatherCall call;
  DSV4_CHECK(CheckGather(block_table, ids, planes, *out, layer, &call));
  switch (call.pool.format) {
    case EntryFormat::kDense:
      return Launch<EntryFormat::kDense>(call, stream);
    case EntryFormat::kRecord:
      return Launch<EntryFormat::kRecord>(call, stream);
    default:
      return Launch<EntryFormat::kFloatScale>(call, stream);
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_gather_kv, GatherKv,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("layer"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
