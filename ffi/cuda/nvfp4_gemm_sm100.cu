// nvfp4_gemm, nvfp4_grouped_gemm on the sm_100 family: tensor maps, the plan, the launch.
// Architectures: 100f

#include <cuda.h>

#include <cstring>

#include "nvfp4_gemm_sm100.cuh"
#include "nvfp4_launch_sm100.cuh"

namespace dsv4 {
namespace {

static_assert(sizeof(CUtensorMap) == sizeof(TensorMap), "TensorMap stands for CUtensorMap");

// Of the driver, which this library is not linked with.
decltype(&cuTensorMapEncodeTiled) TensorMapEncoder() {
  static const auto encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                     &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  return encoder;
}

// Packed rows as bytes, in boxes of 128 bytes x `box_rows` rows.
ffi::Error EncodePackedRows(const char* name, const uint8_t* codes, int64_t rows, int64_t width,
                            int32_t box_rows, TensorMap& map) {
  const cuuint64_t row_bytes = width / 2;
  const cuuint64_t sizes[] = {row_bytes, static_cast<cuuint64_t>(rows)}, strides[] = {row_bytes};
  const cuuint32_t box[] = {sm100::kStageWidth / 2, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  CUtensorMap encoded;
  const CUresult status = TensorMapEncoder()(
      &encoded, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<uint8_t*>(codes), sizes, strides, box,
      steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    return ffi::Error::Internal(std::string(name) + ": cuTensorMapEncodeTiled returned " +
                                std::to_string(status));
  }
  std::memcpy(&map, &encoded, sizeof(map));
  return ffi::Error::Success();
}

template <int32_t kTokens>
ffi::Error Launch(cudaStream_t stream, const Nvfp4GemmCall& call, const sm100::Problem& problem,
                  const sm100::Plan& plan) {
  constexpr int32_t kDynamicBytes = sm100::Tile<kTokens>::kDynamicBytes;
  auto* kernel = sm100::Nvfp4GemmKernel<kTokens, sm100::StoreBfloat16>;
  static const cudaError_t configured = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kDynamicBytes);
  DSV4_CHECK(CudaStatus(configured));
  sm100::Nvfp4Gemm gemm;
  DSV4_CHECK(EncodePackedRows("weights", call.weights.codes, call.num_groups * call.num_features,
                              call.width, sm100::kTileFeatures, gemm.weights));
  DSV4_CHECK(EncodePackedRows("tokens", call.tokens.codes, call.num_tokens, call.width, kTokens,
                              gemm.tokens));
  gemm.weight_scales = call.weights.scales;
  gemm.token_scales = call.tokens.scales;
  gemm.weight_global_scales = call.weights.global_scales;
  gemm.token_global_scales = call.tokens.global_scales;
  gemm.group_sizes = call.group_sizes;
  gemm.problem = problem;

  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(plan.cluster_size), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = plan.num_blocks;
  config.blockDim = sm100::kThreads;
  config.dynamicSmemBytes = kDynamicBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  const sm100::StoreBfloat16 sink = {call.out, call.num_features};
  return CudaStatus(cudaLaunchKernelEx(&config, kernel, gemm, sink));
}

ffi::Error CheckLimits(const Nvfp4GemmCall& call) {
  constexpr int64_t kMaxTokens = 1 << 25, kMaxWeightRows = 1 << 30;  // 32-bit sums
  if (call.num_groups > sm100::kMaxGroups) {
    return Invalid("weights", std::to_string(call.num_groups) + " groups",
                   "at most " + std::to_string(sm100::kMaxGroups));
  }
  if (call.num_tokens > kMaxTokens || call.num_groups * call.num_features > kMaxWeightRows) {
    return Invalid("tokens, weights", "more than 2^25 tokens or 2^30 rows of weights", "fewer");
  }
  return ffi::Error::Success();
}

}  // namespace

ffi::Error LaunchNvfp4GemmSm100(cudaStream_t stream, const Nvfp4GemmCall& call) {
  DSV4_CHECK(CheckLimits(call));
  int device, major, num_multiprocessors;
  DSV4_CHECK(CudaStatus(cudaGetDevice(&device)));
  DSV4_CHECK(
      CudaStatus(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)));
  DSV4_CHECK(CudaStatus(cudaDeviceGetAttribute(&num_multiprocessors,
                                               cudaDevAttrMultiProcessorCount, device)));
  if (major != 10 || TensorMapEncoder() == nullptr) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "products of two NVFP4 operands need a device of compute capability 10.x, "
                      "this one is " + std::to_string(major) + ".x");
  }
  if (call.num_tokens == 0 || call.num_features == 0) return ffi::Error::Success();
  const sm100::Problem problem = {
      static_cast<int32_t>(call.num_tokens), static_cast<int32_t>(call.num_features),
      static_cast<int32_t>(call.width), static_cast<int32_t>(call.num_groups)};
  const sm100::Plan plan = sm100::MakePlan(problem, num_multiprocessors);
  switch (plan.tile_tokens) {
    case 32: return Launch<32>(stream, call, problem, plan);
    case 64: return Launch<64>(stream, call, problem, plan);
    case 128: return Launch<128>(stream, call, problem, plan);
    default: return Launch<192>(stream, call, problem, plan);
  }
}

namespace {

ffi::Error Nvfp4Gemm(cudaStream_t stream, ffi::RemainingArgs operands,
                     ffi::Result<ffi::AnyBuffer> out) {
  Nvfp4GemmCall call;
  DSV4_CHECK(ParseNvfp4Gemm(operands, *out, call));
  return LaunchNvfp4GemmSm100(stream, call);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_nvfp4_gemm, Nvfp4Gemm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_nvfp4_grouped_gemm, Nvfp4Gemm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
