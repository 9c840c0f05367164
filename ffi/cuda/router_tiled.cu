// Architectures: 90a
// dense_router of many tokens: sums of the gate's product over slices of the width, in tiles; then
// a warp for each token adds them up and selects.

#include <cuda.h>

#include <algorithm>
#include <cstring>

#include "dsv4/router.h"
#include "router.cuh"
#include "router_tiled.cuh"
#include "router_tiled_launch.cuh"

namespace dsv4 {
namespace {

static_assert(sizeof(CUtensorMap) == sizeof(TensorMap), "TensorMap stands for CUtensorMap");

constexpr int kSelectWarps = 4;
constexpr int kSlicesAtOnce = 8;

template <int kPerLane, bool kFull>
__global__ void __launch_bounds__(kSelectWarps * kWarp) SelectFromSums(TiledRouterCall call) {
  __shared__ __align__(16) TokenExperts<kPerLane> of_warps[kSelectWarps];
  const int64_t warp = threadIdx.x / kWarp, token = blockIdx.x * kSelectWarps + warp;
  float biases[kPerLane];
  LoadLane<kPerLane, kFull>(call.bias, call.num_experts, -Infinity(), biases);
  WaitForPreviousKernel();
  if (token >= call.num_tokens) return;
  const float* from = call.sums + token * call.pitch;
  const int64_t slice = call.num_tokens * call.pitch;
  float logits[kPerLane] = {};
#pragma unroll 1
  for (int first = 0; first < call.num_slices; first += kSlicesAtOnce) {
    float parts[kSlicesAtOnce][kPerLane];
#pragma unroll
    for (int i = 0; i < kSlicesAtOnce; ++i) {
      if (first + i < call.num_slices) {
        LoadLane<kPerLane, kFull>(from + (first + i) * slice, call.num_experts, 0.0f, parts[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kSlicesAtOnce; ++i) {
      if (first + i >= call.num_slices) break;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) logits[j] += parts[i][j];
    }
  }
  RouteLogits<kMaxGateTopK>(logits, biases, of_warps[warp], call.top_k, call.scale,
                            call.weights + token * call.top_k, call.ids + token * call.top_k);
}

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

// Rows in boxes of a stage's columns x `box_rows` rows.
ffi::Error EncodeRows(const uint16_t* data, int64_t rows, int64_t width, int box_rows,
                      TensorMap& map) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {sizes[0] * sizeof(uint16_t)};
  const cuuint32_t box[] = {kGateStageColumns, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  CUtensorMap encoded;
  const CUresult status = TensorMapEncoder()(
      &encoded, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<uint16_t*>(data), sizes, strides,
      box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    return ffi::Error::Internal("dense_router: cuTensorMapEncodeTiled returned " +
                                std::to_string(status));
  }
  std::memcpy(&map, &encoded, sizeof(map));
  return ffi::Error::Success();
}

template <typename... Parameters>
ffi::Error LaunchWith(const cudaLaunchAttribute& attribute, dim3 grid, int threads, int bytes,
                      cudaStream_t stream, void (*kernel)(Parameters...),
                      const Parameters&... parameters) {
  cudaLaunchAttribute attributes[] = {attribute};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  return CudaStatus(cudaLaunchKernelEx(&config, kernel, parameters...));
}

ffi::Error LaunchProduct(cudaStream_t stream, const TiledRouterCall& call) {
  // Of the current device.
  DSV4_CHECK(CudaStatus(cudaFuncSetAttribute(
      GateSums, cudaFuncAttributeMaxDynamicSharedMemorySize, kGateDynamicBytes)));
  const int token_tiles = (call.num_tokens + kGateTile - 1) / kGateTile;
  const int expert_tiles = (call.num_experts + kGateTile - 1) / kGateTile;
  const int peers = expert_tiles % kMaxGatePeers == 0 ? kMaxGatePeers : 1;
  GateProduct product = {};
  DSV4_CHECK(EncodeRows(call.x, call.num_tokens, call.width, kGateTile / peers, product.x));
  DSV4_CHECK(EncodeRows(call.gate, call.num_experts, call.width, kGateTile, product.gate));
  product.num_tokens = call.num_tokens;
  product.num_stages = (call.width + kGateStageColumns - 1) / kGateStageColumns;
  product.pitch = call.pitch;
  product.sums = call.sums;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(peers), 1, 1};
  return LaunchWith(cluster, dim3(expert_tiles, token_tiles, call.num_slices), kGateThreads,
                    kGateDynamicBytes, stream, GateSums, product);
}

}  // namespace

ffi::Error LaunchTiledRouter(cudaStream_t stream, const TiledRouterCall& call) {
  DSV4_CHECK(LaunchProduct(stream, call));
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  const auto kernel = call.num_experts == 256   ? SelectFromSums<8, true>
                      : call.num_experts == 384 ? SelectFromSums<12, true>
                                                : SelectFromSums<12, false>;
  return LaunchWith(early, (call.num_tokens + kSelectWarps - 1) / kSelectWarps,
                    kSelectWarps * kWarp, 0, stream, kernel, call);
}

}  // namespace dsv4
