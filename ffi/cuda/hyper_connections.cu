// hc_pre, hc_post and hc_post_pre: gates, collapse and spread of the residual streams.
// Architectures: 90a 100f

#include "dsv4/hyper_connections.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "hyper_pre.cuh"

namespace dsv4 {
namespace {

using hyper::Problem;
using hyper::Shared;

constexpr int kPostThreads = 256;

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

// How many clusters of so many blocks run at a time; also lets the kernel use what it needs.
template <bool kSpread>
cudaError_t MaxClusters(const cudaLaunchConfig_t& config, int num_ranks, int& num_clusters) {
  const auto kernel = hyper::HcPre<kSpread>;
  static std::mutex mutex;
  static std::map<int, int> known;
  std::lock_guard<std::mutex> lock(mutex);
  auto [found, is_new] = known.try_emplace(num_ranks, 0);
  cudaError_t status = cudaSuccess;
  if (is_new) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (status == cudaSuccess) {
      status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    sizeof(Shared));
    }
    if (status == cudaSuccess) {
      status = cudaOccupancyMaxActiveClusters(&found->second, kernel, &config);
    }
  }
  num_clusters = found->second;
  return status;
}

template <bool kSpread>
cudaError_t LaunchPre(const Problem& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  int num_ranks = 1 << p.log2_ranks;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(num_ranks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(num_ranks);
  config.blockDim = dim3(hyper::kThreads);
  config.dynamicSmemBytes = sizeof(Shared);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int num_clusters = 0;
  cudaError_t status = MaxClusters<kSpread>(config, num_ranks, num_clusters);
  if (status != cudaSuccess) return status;
  int num_tiles = (p.num_tokens + hyper::kTileTokens - 1) / hyper::kTileTokens;
  config.gridDim = dim3(num_ranks * std::max(1, std::min(num_clusters, num_tiles)));
  return cudaLaunchKernelEx(&config, hyper::HcPre<kSpread>, p);
}

// Widths that clusters of a permitted size share.
ffi::Error ExpectClusterWidth(int64_t width) {
  int64_t num_ranks = width / hyper::kBlockChannels;
  if (width % hyper::kBlockChannels == 0 && 1 <= num_ranks && num_ranks <= hyper::kMaxRanks &&
      (num_ranks & (num_ranks - 1)) == 0) {
    return ffi::Error::Success();
  }
  return Invalid("width", std::to_string(width), "256, 512, 1024, 2048 or 4096");
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
              ffi::Result<ffi::AnyBuffer>& comb) {
  p.num_tokens = streams.dimensions()[0];
  p.width = streams.dimensions()[2];
  p.streams = In<uint16_t>(streams);
  while (hyper::kBlockChannels << p.log2_ranks < p.width) ++p.log2_ranks;
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
               ffi::Result<ffi::AnyBuffer> comb) {
  DSV4_CHECK(ExpectGates(streams, fn, base, scale, norm_weight));
  DSV4_CHECK(ExpectClusterWidth(streams.dimensions()[2]));
  Problem p = {};
  SetGates(p, streams, fn, base, scale, norm_weight, num_iterations, eps, norm_eps, x, post, comb);
  return CudaStatus(LaunchPre<false>(p, stream));
}

ffi::Error PostPre(cudaStream_t stream, ffi::AnyBuffer output, ffi::AnyBuffer streams,
                   ffi::AnyBuffer post, ffi::AnyBuffer comb, ffi::AnyBuffer fn,
                   ffi::AnyBuffer base, ffi::AnyBuffer scale, ffi::AnyBuffer norm_weight,
                   int32_t num_iterations, float eps, float norm_eps,
                   ffi::Result<ffi::AnyBuffer> new_streams, ffi::Result<ffi::AnyBuffer> x,
                   ffi::Result<ffi::AnyBuffer> new_post, ffi::Result<ffi::AnyBuffer> new_comb) {
  DSV4_CHECK(ExpectSpread(output, streams, post, comb));
  DSV4_CHECK(ExpectGates(streams, fn, base, scale, norm_weight));
  DSV4_CHECK(ExpectClusterWidth(streams.dimensions()[2]));
  Problem p = {};
  SetSpread(p, output, streams, post, comb, new_streams);
  SetGates(p, streams, fn, base, scale, norm_weight, num_iterations, eps, norm_eps, x, new_post,
           new_comb);
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
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
