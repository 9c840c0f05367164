// gather_kv: a warp for each entry.
// Architectures: 90a 100f

#include "cache_entry.cuh"
#include "dsv4/cache_gather.h"

namespace dsv4 {
namespace {

constexpr int kWarps = 8, kLaneChannels = 8, kHalf = kHeadDim / 2;

// Eight channels of an entry that has a row.
template <EntryFormat kFormat>
__device__ uint4 LoadChannels(const EntryPlanes& planes, int64_t row, int channel) {
  const uint8_t* body = planes.body + row * BodyBytes(kFormat, kHeadDim);
  if (kFormat == EntryFormat::kDense) return *reinterpret_cast<const uint4*>(body + 2 * channel);
  if (channel >= kNopeDim) {
    return *reinterpret_cast<const uint4*>(body + kNopeDim + 2 * (channel - kNopeDim));
  }
  const uint8_t* scales = planes.scales + row * ScaleBytes(kFormat, kHeadDim);
  const uint2 codes = *reinterpret_cast<const uint2*>(body + channel);
  const float scale = kFormat == EntryFormat::kFloatScale
                          ? *reinterpret_cast<const float*>(scales)
                          : DecodeE8m0(scales[channel / kRecordGroup]);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t pair = (i < 2 ? codes.x : codes.y) >> (16 * (i % 2)) & 0xffffu;
    const __half2 halves = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3);
    const float2 values = __half22float2(halves);
    words[i] = PackBfloat16(values.x * scale, values.y * scale);
  }
  return {words[0], words[1], words[2], words[3]};
}

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
    low = LoadChannels<kFormat>(call.pool, row, kLaneChannels * lane);
    high = LoadChannels<kFormat>(call.pool, row, kHalf + kLaneChannels * lane);
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
