// gemm: x Wᵀ for several tiled weights of the same input. coded_gemm: for one, of E4M3 codes.
// Architectures: 90a 100f

#include <algorithm>
#include <type_traits>

#include "decoded_launch_sm100.cuh"
#include "dsv4/coded_inputs.h"
#include "dsv4/gemm.h"
#include "gemm_direct_launch.cuh"
#include "gemm_row_launch.cuh"
#include "gemm_tiled_launch.cuh"

namespace dsv4 {
namespace {

int DeviceAttribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Segments are sorted by their format.
template <int kTokenTiles>
cudaError_t Direct(const GemmCall& call, int num_blocks, cudaStream_t stream) {
  using F = WeightFormat;
  constexpr int kWarps = 16, kChunks = 8;
  const auto launch = [&](auto... formats) {
    return LaunchDirect<kWarps, kTokenTiles, kChunks, decltype(formats)::value...>(
        call, num_blocks, stream);
  };
  constexpr std::integral_constant<F, F::kMxfp4> mxfp4;
  constexpr std::integral_constant<F, F::kNvfp4> nvfp4;
  constexpr std::integral_constant<F, F::kFp8Block> fp8;
  constexpr std::integral_constant<F, F::kBf16> bf16;
  const F first = call.segments.front().format, last = call.segments.back().format;
  if (first == F::kFp8Block && last == F::kBf16) return launch(fp8, bf16);
  if (first != last) return launch(mxfp4, nvfp4, fp8, bf16);
  switch (first) {
    case F::kMxfp4: return launch(mxfp4);
    case F::kNvfp4: return launch(nvfp4);
    case F::kFp8Block: return launch(fp8);
    case F::kBf16: break;
  }
  return launch(bf16);
}

// Whether the kernel for one row is launched, with as many warps as are fastest on an H200.
// Segments are sorted by their format.
bool LaunchIfRow(const GemmCall& call, int num_blocks, cudaStream_t stream, cudaError_t& status) {
  using F = WeightFormat;
  // Fewer warps start sooner, more hide more of what the memory takes.
  constexpr int kFewLog2 = 4, kManyLog2 = 5;
  constexpr int64_t kFewBytes = 64 << 10;  // of FP8 weights to each block
  const F first = call.segments.front().format, last = call.segments.back().format;
  int64_t outputs = 0;
  for (const GemmSegment& segment : call.segments) {
    if (segment.format == F::kBf16 && segment.round_input) return false;
    outputs += segment.num_outputs;
  }
  if (first == F::kFp8Block && last == F::kFp8Block) {
    return outputs * call.width < num_blocks * kFewBytes
               ? LaunchRow<kFewLog2, F::kFp8Block>(call, num_blocks, stream, status)
               : LaunchRow<kManyLog2, F::kFp8Block>(call, num_blocks, stream, status);
  }
  if (first == F::kFp8Block || first == F::kBf16) {
    return LaunchRow<kManyLog2, F::kFp8Block, F::kBf16>(call, num_blocks, stream, status);
  }
  if (first != last) return false;
  return first == F::kMxfp4 ? LaunchRow<kFewLog2, F::kMxfp4>(call, num_blocks, stream, status)
                            : LaunchRow<kFewLog2, F::kNvfp4>(call, num_blocks, stream, status);
}

// Whether the kernel that keeps the inputs is the fastest, as measured on an H200; then it is
// launched.
bool LaunchIfDirect(const GemmCall& unsorted, bool hopper, int num_blocks, cudaStream_t stream,
                    cudaError_t& status) {
  using F = WeightFormat;
  GemmCall call = unsorted;
  std::stable_sort(
      call.segments.begin(), call.segments.end(),
      [](const GemmSegment& a, const GemmSegment& b) { return a.format < b.format; });
  if (call.num_rows == 1 && LaunchIfRow(call, num_blocks, stream, status)) return true;
  if (call.num_rows <= 8) {
    status = Direct<1>(call, num_blocks, stream);
  } else if (call.num_rows <= kMaxStreamedRows) {
    status = Direct<2>(call, num_blocks, stream);
  } else if (hopper && call.num_rows <= kMaxDirectTokens && call.num_groups == 1 &&
             call.segments.front().format == F::kFp8Block &&
             call.segments.back().format == F::kBf16) {
    status = LaunchDirect<8, 4, 8, F::kFp8Block, F::kBf16>(call, num_blocks, stream);
  } else {
    return false;
  }
  return true;
}

ffi::Error Gemm(cudaStream_t stream, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                ffi::Span<const int32_t> formats, ffi::Span<const int32_t> rounded) {
  GemmCall call;
  DSV4_CHECK(ParseGemm(arguments, results, formats, rounded, call));
  if (call.num_rows == 0) return ffi::Error::Success();
  const bool hopper = DeviceAttribute(cudaDevAttrComputeCapabilityMajor) == 9;
  const int num_blocks = DeviceAttribute(cudaDevAttrMultiProcessorCount);
  cudaError_t status = cudaSuccess;
  if (LaunchIfDirect(call, hopper, num_blocks, stream, status)) return CudaStatus(status);
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
