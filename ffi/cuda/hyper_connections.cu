// hc_pre, hc_post and hc_post_pre: gates, collapse and spread of the residual streams.
// Architectures: 90a 100f

#include "dsv4/hyper_connections.h"

#include <algorithm>

#include "hyper_collapse.cuh"
#include "hyper_project.cuh"

namespace dsv4 {
namespace {

using hyper::Problem;

constexpr int kPostThreads = 256, kMaxWidth = 8192;

__global__ void __launch_bounds__(kPostThreads) HcPost(const __grid_constant__ Problem p) {
  int64_t group = int64_t{blockIdx.x} * kPostThreads + threadIdx.x;
  int groups_per_token = p.width / hyper::kLaneChannels;
  int64_t token = group / groups_per_token;
  if (token >= p.num_tokens) return;
  int channel = group % groups_per_token * hyper::kLaneChannels;
  hyper::Mixing mixing;
  mixing.post = __ldg(reinterpret_cast<const float4*>(p.post) + token);
  uint4 streams[kNumStreams];
#pragma unroll
  for (int j = 0; j < kNumStreams; ++j) {
    mixing.comb[j] = __ldg(reinterpret_cast<const float4*>(p.comb) + token * kNumStreams + j);
    streams[j] = __ldg(reinterpret_cast<const uint4*>(
        p.streams + (token * kNumStreams + j) * p.width + channel));
  }
  mixing.Apply(__ldg(reinterpret_cast<const uint4*>(p.output + token * p.width + channel)),
               streams);
#pragma unroll
  for (int k = 0; k < kNumStreams; ++k) {
    *reinterpret_cast<uint4*>(p.new_streams + (token * kNumStreams + k) * p.width + channel) =
        streams[k];
  }
}

cudaError_t LaunchPost(const Problem& p, cudaStream_t stream) {
  int64_t num_groups = int64_t{p.num_tokens} * p.width / hyper::kLaneChannels;
  HcPost<<<(num_groups + kPostThreads - 1) / kPostThreads, kPostThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <bool kSpread, int kSteps>
cudaError_t LaunchProject(const Problem& p, cudaStream_t stream) {
  const auto kernel = hyper::Project<kSpread, kSteps>;
  constexpr int kBytes = sizeof(hyper::ProjectShared<kSteps>);
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (allowed != cudaSuccess) return allowed;
  int device = 0, num_multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device);
  int num_tiles = (p.num_tokens + hyper::kTileTokens - 1) / hyper::kTileTokens;
  int num_groups = std::max(1, std::min(num_multiprocessors / p.num_parts, num_tiles));
  kernel<<<num_groups * p.num_parts, hyper::kProjectThreads<kSteps>, kBytes, stream>>>(p);
  return cudaGetLastError();
}

template <int kParts>
cudaError_t LaunchCollapse(const Problem& p, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = p.num_tokens;
  config.blockDim = hyper::kCollapseThreads;
  config.dynamicSmemBytes = hyper::CollapseBytes(p.width);
  config.stream = stream;
  // Of few tokens, it is launched while the sums are computed and waits for them on the device.
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = kParts > 1;
  return cudaLaunchKernelEx(&config, hyper::Collapse<kParts>, p);
}

template <bool kSpread>
cudaError_t LaunchPre(Problem p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  constexpr int kSteps = hyper::kStepsPerSum;
  const bool few = p.num_parts * hyper::kStepChannels == p.width;
  cudaError_t status = few ? LaunchProject<kSpread, 1>(p, stream)
                           : LaunchProject<kSpread, kSteps>(p, stream);
  if (status != cudaSuccess) return status;
  if (kSpread) p.streams = p.new_streams;
  return few ? LaunchCollapse<kSteps>(p, stream) : LaunchCollapse<1>(p, stream);
}

// The sums have a part for each step, of few tokens, or for as many as are added up first.
ffi::Error ExpectSums(const ffi::AnyBuffer& streams, ffi::Result<ffi::AnyBuffer>& sums) {
  const int64_t num_tokens = streams.dimensions()[0], width = streams.dimensions()[2];
  DSV4_CHECK(ExpectMultiple("width", width, hyper::kChunkChannels));
  if (width > kMaxWidth) {
    return Invalid("width", std::to_string(width), "at most " + std::to_string(kMaxWidth));
  }
  DSV4_CHECK(Expect("sums", *sums, ffi::DataType::F32, {kAnySize, num_tokens, hyper::kSums}));
  const int64_t num_parts = sums->dimensions()[0];
  if (num_parts * hyper::kStepChannels == width || num_parts * hyper::kChunkChannels == width) {
    return ffi::Error::Success();
  }
  return Invalid("sums", std::to_string(num_parts) + " parts", "width / 32 or width / 256");
}

template <typename T>
const T* In(const ffi::AnyBuffer& buffer) {
  return static_cast<const T*>(buffer.untyped_data());
}

template <typename T>
T* Out(ffi::Result<ffi::AnyBuffer>& buffer) {
  return static_cast<T*>(buffer->untyped_data());
}

void SetSpread(Problem& p, const ffi::AnyBuffer& output, const ffi::AnyBuffer& streams,
               const ffi::AnyBuffer& post, const ffi::AnyBuffer& comb,
               ffi::Result<ffi::AnyBuffer>& new_streams) {
  p.num_tokens = streams.dimensions()[0];
  p.width = streams.dimensions()[2];
  p.output = In<uint16_t>(output);
  p.streams = In<uint16_t>(streams);
  p.post = In<float>(post);
  p.comb = In<float>(comb);
  p.new_streams = Out<uint16_t>(new_streams);
}

void SetGates(Problem& p, const ffi::AnyBuffer& streams, const ffi::AnyBuffer& fn,
              const ffi::AnyBuffer& base, const ffi::AnyBuffer& scale,
              const ffi::AnyBuffer& norm_weight, int32_t num_iterations, float eps, float norm_eps,
              ffi::Result<ffi::AnyBuffer>& x, ffi::Result<ffi::AnyBuffer>& post,
              ffi::Result<ffi::AnyBuffer>& comb, ffi::Result<ffi::AnyBuffer>& sums) {
  p.num_tokens = streams.dimensions()[0];
  p.width = streams.dimensions()[2];
  p.streams = In<uint16_t>(streams);
  p.num_parts = sums->dimensions()[0];
  p.sums = Out<float>(sums);
  p.fn = In<float>(fn);
  p.base = In<float>(base);
  p.scale = In<float>(scale);
  p.norm_weight = In<float>(norm_weight);
  p.num_iterations = num_iterations;
  p.eps = eps;
  p.norm_eps = norm_eps;
  p.x = Out<uint16_t>(x);
  p.new_post = Out<float>(post);
  p.new_comb = Out<float>(comb);
}

ffi::Error Post(cudaStream_t stream, ffi::AnyBuffer output, ffi::AnyBuffer streams,
                ffi::AnyBuffer post, ffi::AnyBuffer comb,
                ffi::Result<ffi::AnyBuffer> new_streams) {
  DSV4_CHECK(ExpectSpread(output, streams, post, comb));
  if (streams.element_count() == 0) return ffi::Error::Success();
  Problem p = {};
  SetSpread(p, output, streams, post, comb, new_streams);
  return CudaStatus(LaunchPost(p, stream));
}

ffi::Error Pre(cudaStream_t stream, ffi::AnyBuffer streams, ffi::AnyBuffer fn, ffi::AnyBuffer base,
               ffi::AnyBuffer scale, ffi::AnyBuffer norm_weight, int32_t num_iterations, float eps,
               float norm_eps, ffi::Result<ffi::AnyBuffer> x, ffi::Result<ffi::AnyBuffer> post,
               ffi::Result<ffi::AnyBuffer> comb, ffi::Result<ffi::AnyBuffer> sums) {
  DSV4_CHECK(ExpectGates(streams, fn, base, scale, norm_weight));
  DSV4_CHECK(ExpectSums(streams, sums));
  Problem p = {};
  SetGates(p, streams, fn, base, scale, norm_weight, num_iterations, eps, norm_eps, x, post, comb,
           sums);
  return CudaStatus(LaunchPre<false>(p, stream));
}

ffi::Error PostPre(cudaStream_t stream, ffi::AnyBuffer output, ffi::AnyBuffer streams,
                   ffi::AnyBuffer post, ffi::AnyBuffer comb, ffi::AnyBuffer fn,
                   ffi::AnyBuffer base, ffi::AnyBuffer scale, ffi::AnyBuffer norm_weight,
                   int32_t num_iterations, float eps, float norm_eps,
                   ffi::Result<ffi::AnyBuffer> new_streams, ffi::Result<ffi::AnyBuffer> x,
                   ffi::Result<ffi::AnyBuffer> new_post, ffi::Result<ffi::AnyBuffer> new_comb,
                   ffi::Result<ffi::AnyBuffer> sums) {
  DSV4_CHECK(ExpectSpread(output, streams, post, comb));
  DSV4_CHECK(ExpectGates(streams, fn, base, scale, norm_weight));
  DSV4_CHECK(ExpectSums(streams, sums));
  Problem p = {};
  SetSpread(p, output, streams, post, comb, new_streams);
  SetGates(p, streams, fn, base, scale, norm_weight, num_iterations, eps, norm_eps, x, new_post,
           new_comb, sums);
  return CudaStatus(LaunchPre<true>(p, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_hc_post, Post,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_hc_pre, Pre,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<int32_t>("num_iterations")
                                  .Attr<float>("eps")
                                  .Attr<float>("norm_eps")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_hc_post_pre, PostPre,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<int32_t>("num_iterations")
                                  .Attr<float>("eps")
                                  .Attr<float>("norm_eps")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
