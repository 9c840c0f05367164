// gemm: x Wᵀ for several tiled weights of the same input.
// Architectures: 90a 100f

#include <algorithm>

#include "dsv4/gemm.h"
#include "gemm_launch.cuh"

namespace dsv4 {
namespace {

// From so many rows on, FP8 inputs pay.
constexpr int kMinFp8Rows = 65;

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

// The tile of input rows that costs least.
template <WeightFormat format, int kTokens, int... kMore>
cudaError_t TiledBest(const GemmSegment& gemm, const InputTiles& tiles, int num_blocks,
                      cudaStream_t stream) {
  const auto best = [&](int tokens) { return PlanTiled(gemm, tiles, tokens, num_blocks); };
  const TiledPlan plan = best(kTokens);
  if constexpr (sizeof...(kMore) > 0) {
    if (std::min({best(kMore).cost...}) < plan.cost) {
      return TiledBest<format, kMore...>(gemm, tiles, num_blocks, stream);
    }
  }
  return LaunchTiled<format, kTokens>(gemm, tiles, plan, stream);
}

template <WeightFormat format>
cudaError_t Tiled(const GemmSegment& gemm, const InputTiles& tiles, int num_blocks,
                  cudaStream_t stream) {
  if constexpr (format == WeightFormat::kFp8Block) {
    if (gemm.round_input && tiles.codes != nullptr) {
      const TiledPlan plan = PlanTiled(gemm, tiles, 128, num_blocks);
      return LaunchTiled<format, 128, true>(gemm, tiles, plan, stream);
    }
  }
  return TiledBest<format, 32, 64, 128, 256>(gemm, tiles, num_blocks, stream);
}

cudaError_t Tiled(const GemmCall& call, cudaStream_t stream) {
  const int num_blocks = DeviceAttribute(cudaDevAttrMultiProcessorCount);
  const InputTiles tiles = TilesOf(call, call.num_rows >= kMinFp8Rows);
  cudaError_t status = LaunchTileInputs(tiles, stream);
  for (const GemmSegment& gemm : call.segments) {
    if (status != cudaSuccess) return status;
    const auto run = [&](auto tiled) { status = tiled(gemm, tiles, num_blocks, stream); };
    switch (gemm.format) {
      case WeightFormat::kMxfp4: run(Tiled<WeightFormat::kMxfp4>); break;
      case WeightFormat::kNvfp4: run(Tiled<WeightFormat::kNvfp4>); break;
      case WeightFormat::kFp8Block: run(Tiled<WeightFormat::kFp8Block>); break;
      case WeightFormat::kBf16: run(Tiled<WeightFormat::kBf16>); break;
    }
  }
  return status;
}

// Where there is no wgmma: all rows, 16 at a time.
cudaError_t StreamInSlices(const GemmCall& call, cudaStream_t stream) {
  GemmCall slice = call;
  for (int row = 0; row < call.num_rows; row += kMaxStreamedRows) {
    slice.num_rows = std::min(kMaxStreamedRows, call.num_rows - row);
    slice.x = call.x + int64_t{row} * call.num_groups * call.width;
    for (size_t i = 0; i < call.segments.size(); ++i) {
      const GemmSegment& segment = call.segments[i];
      const int64_t bytes = int64_t{row} * segment.num_outputs * (segment.float_output ? 4 : 2);
      slice.segments[i].output = static_cast<uint8_t*>(segment.output) + bytes;
    }
    const cudaError_t status = Stream(slice, stream);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

ffi::Error Gemm(cudaStream_t stream, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                ffi::Span<const int32_t> formats, ffi::Span<const int32_t> rounded) {
  GemmCall call;
  DSV4_CHECK(ParseGemm(arguments, results, formats, rounded, call));
  if (call.num_rows == 0) return ffi::Error::Success();
  const bool hopper = DeviceAttribute(cudaDevAttrComputeCapabilityMajor) == 9;
  const bool tiled = call.num_rows > kMaxStreamedRows && hopper;
  return CudaStatus(tiled ? Tiled(call, stream) : StreamInSlices(call, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_gemm, Gemm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int32_t>>("formats")
                                  .Attr<ffi::Span<const int32_t>>("rounded"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
