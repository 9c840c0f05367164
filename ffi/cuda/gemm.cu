// gemm: x Wᵀ for several tiled weights of the same input. coded_gemm: for one, of E4M3 codes.
// Architectures: 90a 100f

#include <algorithm>

#include "decoded_launch_sm100.cuh"
#include "dsv4/coded_inputs.h"
#include "dsv4/gemm.h"
#include "gemm_launch.cuh"
#include "gemm_resident_launch.cuh"
#include "gemm_tiled_launch.cuh"

namespace dsv4 {
namespace {

int DeviceAttribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Of units of few and of many warp tiles the one that costs less.
template <int kFew, int kMany, int kTokenTiles, WeightFormat format>
cudaError_t StreamBest(const GemmCall& call, int num_blocks, cudaStream_t stream) {
  constexpr int kWarps = 16, kStages = 8;
  const StreamPlan few = PlanStream<kWarps, kFew>(call, num_blocks);
  const StreamPlan many = PlanStream<kWarps, kMany>(call, num_blocks);
  return few.cost < many.cost ? LaunchStream<kWarps, kFew, kStages / NumChunks(format) * 2 / kFew,
                                             kTokenTiles, format>(call, few, num_blocks, stream)
                              : LaunchStream<kWarps, kMany, kStages / NumChunks(format) * 2 / kMany,
                                             kTokenTiles, format>(call, many, num_blocks, stream);
}

template <int kTokenTiles>
cudaError_t Stream(const GemmCall& call, int num_blocks, cudaStream_t stream) {
  using F = WeightFormat;
  const F format = call.segments[0].format;
  for (const GemmSegment& segment : call.segments) {
    if (segment.format == format) continue;
    return LaunchStream<16, 1, 2, kTokenTiles, F::kMxfp4, F::kNvfp4, F::kFp8Block, F::kBf16>(
        call, PlanStream<16, 1>(call, num_blocks), num_blocks, stream);
  }
  switch (format) {
    case F::kMxfp4: return StreamBest<2, 4, kTokenTiles, F::kMxfp4>(call, num_blocks, stream);
    case F::kNvfp4: return StreamBest<2, 4, kTokenTiles, F::kNvfp4>(call, num_blocks, stream);
    case F::kFp8Block: return StreamBest<1, 2, kTokenTiles, F::kFp8Block>(call, num_blocks, stream);
    case F::kBf16: break;
  }
  // Fewer warps leave registers for 16 rows of input read ahead.
  constexpr int kWarps = kTokenTiles == 1 ? 16 : 8, kRowTiles = 16 / kWarps;
  return LaunchStream<kWarps, kRowTiles, 2, kTokenTiles, F::kBf16>(
      call, PlanStream<kWarps, kRowTiles>(call, num_blocks), num_blocks, stream);
}

cudaError_t Stream(const GemmCall& call, cudaStream_t stream) {
  const int num_blocks = DeviceAttribute(cudaDevAttrMultiProcessorCount);
  return call.num_rows <= 8 ? Stream<1>(call, num_blocks, stream)
                            : Stream<2>(call, num_blocks, stream);
}

ffi::Error Gemm(cudaStream_t stream, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                ffi::Span<const int32_t> formats, ffi::Span<const int32_t> rounded) {
  GemmCall call;
  DSV4_CHECK(ParseGemm(arguments, results, formats, rounded, call));
  if (call.num_rows == 0) return ffi::Error::Success();
  const bool hopper = DeviceAttribute(cudaDevAttrComputeCapabilityMajor) == 9;
  const int num_blocks = DeviceAttribute(cudaDevAttrMultiProcessorCount);
  cudaError_t status = cudaSuccess;
  if (hopper && LaunchIfResident(call, num_blocks, stream, status)) return CudaStatus(status);
  if (call.num_rows <= kMaxStreamedRows) return CudaStatus(Stream(call, stream));
  if (hopper) return CudaStatus(Tiled(call, num_blocks, stream));
  if (LaunchGemmSm100 != nullptr) return LaunchGemmSm100(stream, call);
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "gemm: this library is built for Hopper");
}

ffi::Error CodedGemm(cudaStream_t stream, ffi::AnyBuffer codes, ffi::AnyBuffer scales,
                     ffi::AnyBuffer weight_codes, ffi::AnyBuffer weight_scales,
                     ffi::AnyBuffer global_scale, ffi::Result<ffi::AnyBuffer> output,
                     int32_t format) {
  GemmSegment segment;
  DSV4_CHECK(ParseCodedGemm(codes, scales, weight_codes, weight_scales, global_scale, *output,
                            format, segment));
  if (DeviceAttribute(cudaDevAttrComputeCapabilityMajor) != 9) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented, "coded_gemm: the kernel is for Hopper");
  }
  InputTiles tiles = {};
  tiles.num_rows = static_cast<int32_t>(output->dimensions()[0]);
  tiles.num_groups = 1;
  tiles.blocks_per_row = static_cast<int32_t>(codes.dimensions()[0]);
  tiles.row_tiles = static_cast<int32_t>(codes.dimensions()[1]);
  tiles.codes = static_cast<uint8_t*>(codes.untyped_data());
  tiles.scales = scales.typed_data<float>();
  if (tiles.num_rows == 0) return ffi::Error::Success();
  return CudaStatus(
      Tiled(segment, tiles, DeviceAttribute(cudaDevAttrMultiProcessorCount), stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_coded_gemm, CodedGemm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("format"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_gemm, Gemm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int32_t>>("formats")
                                  .Attr<ffi::Span<const int32_t>>("rounded"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
