// Architectures: 90a
// moe_ffn and grouped_gemm; the kernels here are Hopper's.

#include "dsv4/moe.h"

#include "decoded_launch_sm100.cuh"
#include "moe_launch.cuh"

namespace dsv4 {
namespace {

constexpr int kWidthStep = 256;
// Weights are read once for each block of rows: blocks as large as experts' groups will be.
constexpr int kManyRowsPerExpert = 8;

template <WeightFormat format>
cudaError_t Launch(cudaStream_t stream, const ExpertCall& call, void* memory) {
  if constexpr (format != WeightFormat::kFp8Block) {
    RouteProblem routes = RoutesOf(call);
    if (AreFew(routes)) return LaunchRoutes<format>(stream, routes, memory);
  }
  if (call.shared.gate.codes != nullptr) return cudaErrorNotSupported;
  using Few = MoeShape<format, 2, 16>;
  // More rows of FP8 do not fit into the registers.
  using Many = MoeShape<format, 4, format == WeightFormat::kFp8Block ? 32 : 64>;
  bool few = MeanRows(call) <= kManyRowsPerExpert && call.d % Few::kInputs == 0 &&
             call.f % Few::kInputs == 0;
  return few ? LaunchExperts<Few>(stream, call, memory)
             : LaunchExperts<Many>(stream, call, memory);
}

ffi::Error Run(cudaStream_t stream, WeightFormat format, const ExpertCall& call,
               ffi::AnyBuffer& workspace) {
  DSV4_CHECK(ExpectMultiple("d", call.d, kWidthStep));
  DSV4_CHECK(ExpectMultiple("f", call.f, kWidthStep));
  const int64_t needed = WorkspaceBytes(call);
  if (static_cast<int64_t>(workspace.size_bytes()) < needed) {
    return Invalid("workspace", std::to_string(workspace.size_bytes()) + " bytes",
                   std::to_string(needed) + " or more");
  }
  if (call.routing.num_tokens == 0) return ffi::Error::Success();
  void* memory = workspace.untyped_data();
  switch (format) {
    case WeightFormat::kMxfp4:
      return CudaStatus(Launch<WeightFormat::kMxfp4>(stream, call, memory));
    case WeightFormat::kNvfp4:
      return CudaStatus(Launch<WeightFormat::kNvfp4>(stream, call, memory));
    case WeightFormat::kFp8Block:
      return CudaStatus(Launch<WeightFormat::kFp8Block>(stream, call, memory));
    default:
      return Invalid("weight_format", "bf16", "a packed format");
  }
}

bool IsHopper() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major == 9;
}

ffi::Error OnlyHopper() {
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "this library is built for Hopper");
}

ExpertWorkspace MemoryOf(ffi::AnyBuffer& workspace) {
  return {workspace.untyped_data(), static_cast<int64_t>(workspace.size_bytes())};
}

Weight DeviceWeight(const ExpertWeight& weight) {
  return {weight.codes, weight.scales, weight.global_scale};
}

ffi::Error MoeFfn(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer weights,
                  ffi::AnyBuffer expert_ids, ffi::AnyBuffer valid, ffi::RemainingArgs projections,
                  ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> workspace,
                  int32_t weight_format, float limit, bool round_input) {
  MoeCall moe;
  DSV4_CHECK(ParseMoe(x, weights, expert_ids, valid, projections, *out, weight_format, limit,
                      round_input, moe));
  if (!IsHopper()) {
    return LaunchMoeSm100 != nullptr && !moe.has_shared
               ? LaunchMoeSm100(stream, moe, MemoryOf(*workspace))
               : OnlyHopper();
  }
  ExpertCall call = {};
  call.routing = {moe.expert_ids, moe.valid, moe.weights, nullptr,
                  moe.num_tokens, moe.top_k, moe.num_experts};
  call.x = moe.x;
  call.gate = DeviceWeight(moe.gate);
  call.up = DeviceWeight(moe.up);
  call.down = DeviceWeight(moe.down);
  if (moe.has_shared) {
    call.shared = {DeviceWeight(moe.shared.gate), DeviceWeight(moe.shared.up),
                   DeviceWeight(moe.shared.down)};
  }
  call.out = moe.out;
  call.d = moe.d;
  call.f = moe.f;
  call.limit = moe.limit;
  call.quantize = moe.round_input;
  return Run(stream, moe.format, call, *workspace);
}

ffi::Error GroupedGemm(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer group_sizes,
                       ffi::RemainingArgs weight, ffi::Result<ffi::AnyBuffer> out,
                       ffi::Result<ffi::AnyBuffer> workspace, int32_t weight_format,
                       bool round_input) {
  GroupedGemmCall gemm;
  DSV4_CHECK(ParseGroupedGemm(x, group_sizes, weight, *out, weight_format, round_input, gemm));
  if (!IsHopper()) {
    return LaunchGroupedGemmSm100 != nullptr
               ? LaunchGroupedGemmSm100(stream, gemm, MemoryOf(*workspace))
               : OnlyHopper();
  }
  ExpertCall call = {};
  call.routing = {nullptr, nullptr, nullptr, gemm.group_sizes, gemm.num_rows, 1, gemm.num_experts};
  call.x = gemm.x;
  call.down = DeviceWeight(gemm.weight);
  call.y = gemm.out;
  call.d = gemm.outputs;
  call.f = gemm.inputs;
  call.quantize = gemm.round_input;
  return Run(stream, gemm.format, call, *workspace);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_moe_ffn, MoeFfn,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("weight_format")
                                  .Attr<float>("limit")
                                  .Attr<bool>("round_input"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_grouped_gemm, GroupedGemm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("weight_format")
                                  .Attr<bool>("round_input"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
