// activation_topk: gate logits to experts and weights, one warp a token.

#include <algorithm>

#include "dsv4/ffi.h"
#include "dsv4/router.h"
#include "router.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 4;
constexpr int kBlocksPerSm = 10, kMaxBlocks = kBlocksPerSm * 132;

// Blocks of y have a bias each; a warp takes every so many-th token.
template <int kTopK, int kPerLane, bool kFull>
__global__ void __launch_bounds__(kWarps * kWarp, kPerLane <= 8 ? kBlocksPerSm : 1)
    ActivationTopk(const float* logits, const float* bias, uint32_t num_tokens,
                   uint32_t num_experts, uint32_t top_k, float scale, float* weights,
                   int32_t* ids) {
  __shared__ __align__(16) TokenExperts<kPerLane> of_warps[kWarps];
  TokenExperts<kPerLane>& experts = of_warps[threadIdx.x / kWarp];
  const int64_t first = int64_t{blockIdx.y} * num_tokens;
  logits += first * num_experts, weights += first * top_k, ids += first * top_k;
  bias += int64_t{blockIdx.y} * num_experts;
  float biases[kPerLane];
  LoadLane<kPerLane, kFull>(bias, num_experts, -Infinity(), biases);
  const uint32_t warp = threadIdx.x / kWarp, step = gridDim.x * kWarps;
  // Warps behind the last token stay with the others, so that all lanes are known to be together.
  for (uint32_t begin = blockIdx.x * kWarps; begin < num_tokens; begin += step) {
    const uint64_t token = min(begin + warp, num_tokens - 1);
    float row[kPerLane];
    LoadLane<kPerLane, kFull>(logits + token * num_experts, num_experts, 0.0f, row);
    RouteLogits<kTopK>(row, biases, experts, top_k, scale, weights + token * top_k,
                       ids + token * top_k);
    __syncwarp();
  }
}

template <int kTopK>
auto KernelFor(int64_t num_experts) {
  if (num_experts == 256) return ActivationTopk<kTopK, 8, true>;
  if (num_experts == 384) return ActivationTopk<kTopK, 12, true>;
  if (num_experts <= kWarp) return ActivationTopk<kTopK, 1, false>;
  if (num_experts <= 12 * kWarp) return ActivationTopk<kTopK, 12, false>;
  return ActivationTopk<kTopK, kMaxExperts / kWarp, false>;
}

ffi::Error Impl(cudaStream_t stream, ffi::AnyBuffer logits, ffi::AnyBuffer bias, float scale,
                ffi::Result<ffi::AnyBuffer> weights, ffi::Result<ffi::AnyBuffer> ids) {
  DSV4_CHECK(ExpectActivationTopk(logits, bias, *weights, *ids));
  int64_t num_experts = logits.dimensions().back(), top_k = ids->dimensions().back();
  int64_t num_biases = bias.element_count() / num_experts;
  int64_t num_tokens = logits.element_count() / num_experts / num_biases;
  if (num_tokens == 0) return ffi::Error::Success();
  auto* kernel = top_k <= 6 ? KernelFor<6>(num_experts) : KernelFor<kMaxTopK>(num_experts);
  dim3 grid(std::min((num_tokens + kWarps - 1) / kWarps, int64_t{kMaxBlocks}), num_biases);
  kernel<<<grid, kWarps * kWarp, 0, stream>>>(
      logits.typed_data<float>(), bias.typed_data<float>(), num_tokens, num_experts, top_k, scale,
      weights->typed_data<float>(), ids->typed_data<int32_t>());
  return CudaStatus(cudaGetLastError());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_activation_topk, Impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
