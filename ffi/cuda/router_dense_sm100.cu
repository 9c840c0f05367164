// dense_router on the sm_100 family: the launch.
// Architectures: 100f

#include <atomic>

#include "router_dense_sm100.cuh"
#include "router_launch_sm100.cuh"

namespace dsv4 {
namespace {

// Launches take turns with the slots: the counters, zero between launches, of launches that run at
// the same time are different.
constexpr int kSlots = 64;
__device__ uint32_t arrivals[kSlots][sm100::kRouterSplits];
std::atomic<unsigned> next_slot{0};

template <int32_t kTokens, typename Gate>
cudaError_t LaunchTile(cudaStream_t stream, const sm100::RouterProblem& p, const Gate& gate) {
  constexpr int32_t kDynamicBytes = sm100::RouterTile<kTokens>::kDynamicBytes;
  auto* kernel = sm100::DenseRouterKernel<kTokens, Gate>;
  // Of the current device.
  const cudaError_t configured =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kDynamicBytes);
  if (configured != cudaSuccess) return configured;
  const dim3 grid(sm100::kRouterSplits,
                  (p.num_experts + sm100::kTileExperts - 1) / sm100::kTileExperts);
  kernel<<<grid, sm100::kRouterThreads, kDynamicBytes, stream>>>(p, gate);
  return cudaGetLastError();
}

template <typename Gate>
ffi::Error Launch(cudaStream_t stream, const sm100::RouterProblem& p, const Gate& gate) {
  return CudaStatus(p.num_tokens <= 16 ? LaunchTile<16>(stream, p, gate)
                                       : LaunchTile<64>(stream, p, gate));
}

}  // namespace

ffi::Error LaunchDenseRouterSm100(cudaStream_t stream, const DenseRouterCall& call) {
  void* counters = nullptr;
  DSV4_CHECK(CudaStatus(cudaGetSymbolAddress(&counters, arrivals)));
  const unsigned slot = next_slot.fetch_add(1) % kSlots;
  sm100::RouterProblem p = {};
  p.x = static_cast<const uint16_t*>(call.x.untyped_data());
  p.bias = call.bias.typed_data<float>();
  p.num_tokens = static_cast<int32_t>(call.x.dimensions()[0]);
  p.width = static_cast<int32_t>(call.x.dimensions()[1]);
  p.num_experts = static_cast<int32_t>(call.bias.element_count());
  p.top_k = static_cast<int32_t>(call.ids.dimensions()[1]);
  p.scale = call.scale;
  p.scores = call.scores.typed_data<float>();
  p.weights = call.weights.typed_data<float>();
  p.ids = call.ids.typed_data<int32_t>();
  p.arrivals = static_cast<uint32_t*>(counters) + slot * sm100::kRouterSplits;
  if (call.gate.element_type() == ffi::DataType::BF16) {
    const Bfloat16Gate gate = {static_cast<const uint16_t*>(call.gate.untyped_data()), p.width};
    return Launch(stream, p, gate);
  }
  const Nvfp4Gate gate = {call.gate.typed_data<uint8_t>(),
                          static_cast<const uint8_t*>(call.scales.untyped_data()),
                          call.global_scale.typed_data<float>(), p.width};
  return Launch(stream, p, gate);
}

}  // namespace dsv4
