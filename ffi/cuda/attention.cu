// Architectures: 90a
// sparse_attention: the kernels' launches and the checks of what they are given.

#include <algorithm>

#include "attention_cluster.cuh"
#include "attention_kernel.cuh"
#include "attention_prefill_launch.cuh"
#include "dsv4/attention.h"

namespace dsv4 {
namespace {

cudaError_t Launch(cudaStream_t stream, const AttentionProblem& p) {
  // Of the current device.
  const cudaError_t allowed = cudaFuncSetAttribute(
      Attend, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(AttentionShared));
  if (allowed != cudaSuccess) return allowed;
  int device = 0, num_multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config = {};
  config.gridDim = p.in_pairs() ? p.num_items : std::min(p.num_items, num_multiprocessors);
  config.blockDim = kAttentionThreads;
  config.dynamicSmemBytes = sizeof(AttentionShared);
  config.stream = stream;
  config.attrs = &attribute;
  if (p.in_pairs()) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {2, 1, 1};
    config.numAttrs = 1;
  }
  const cudaError_t launched = cudaLaunchKernelEx(&config, Attend, p);
  if (launched != cudaSuccess || !p.in_parts()) return launched;
  // Launched while the parts are computed, it waits for them on the device.
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config = {};
  config.gridDim = dim3(p.a.num_queries, p.a.heads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  // Few splits are loaded at once; many are shared among more threads.
  const int groups = p.rule.max_splits <= 8 ? 1 : 4;
  config.blockDim = groups * kWarpgroup;
  return cudaLaunchKernelEx(&config, groups == 1 ? Combine<1> : Combine<4>, p);
}

template <int kHeads>
cudaError_t LaunchInClusters(cudaStream_t stream, const ClusterProblem& p) {
  constexpr int kSharedBytes = sizeof(ClusterShared<kHeads>);
  const cudaError_t allowed = cudaFuncSetAttribute(
      AttendInCluster<kHeads>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (allowed != cudaSuccess) return allowed;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {1u << p.log_ranks, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(p.a.num_queries / p.a.tokens << p.log_ranks,
                        (p.a.heads + kHeads - 1) / kHeads, p.a.tokens);
  config.blockDim = kClusterThreads;
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, AttendInCluster<kHeads>, p);
}

ffi::Error SparseAttentionInClusters(cudaStream_t stream, const Attention& a, uint16_t* o,
                                     int64_t heads_each, int64_t ranks) {
  ClusterProblem p = {a, 1, o};
  while (p.log_ranks < kLogMaxRanks && 1 << p.log_ranks < ranks) ++p.log_ranks;
  if (1 << p.log_ranks != ranks) {
    return Invalid("max_splits", std::to_string(ranks), "2, 4 or 8 for fewer than 64 heads");
  }
  if (heads_each == 8) return CudaStatus(LaunchInClusters<8>(stream, p));
  if (heads_each == 16) return CudaStatus(LaunchInClusters<16>(stream, p));
  return Invalid("heads_each", std::to_string(heads_each), "8, 16 or 64");
}

ffi::Error SparseAttention(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer sink,
                           ffi::AnyBuffer frequencies, ffi::AnyBuffer ring,
                           ffi::AnyBuffer ring_scales, ffi::AnyBuffer recent,
                           ffi::AnyBuffer recent_scales, ffi::AnyBuffer pool,
                           ffi::AnyBuffer pool_scales, ffi::AnyBuffer block_table,
                           ffi::AnyBuffer ids, ffi::AnyBuffer start, ffi::AnyBuffer length,
                           ffi::Result<ffi::AnyBuffer> o, ffi::Result<ffi::AnyBuffer> parts,
                           ffi::Result<ffi::AnyBuffer> workspace, int64_t layer,
                           int64_t pool_layer, int64_t window, int64_t ratio, float scale,
                           int64_t heads_each, int64_t max_splits, int64_t min_blocks) {
  AttentionProblem p;
  DSV4_CHECK(CheckAttention({q, sink, frequencies, ring, ring_scales, recent, recent_scales, pool,
                             pool_scales, block_table, ids, start, length, layer, pool_layer,
                             window, ratio, scale},
                            *o, &p.a));
  DSV4_CHECK(ExpectDtype("q", q, {ffi::DataType::BF16}));
  if (p.a.width != kWidth || p.a.rotary_width != kRotary) {
    return Invalid("q", ShapeText(q.dimensions()), "512 channels of which 64 are rotary");
  }
  if (p.a.num_queries == 0 || p.a.heads == 0) return ffi::Error::Success();
  p.tiles = (p.a.heads + kTileRows - 1) / kTileRows;
  DSV4_CHECK(ExpectAligned("q", q, 16));
  DSV4_CHECK(ExpectAligned("ring", ring, 16));
  DSV4_CHECK(ExpectAligned("recent", recent, 16));
  DSV4_CHECK(ExpectAligned("pool", pool, 16));
  p.o = static_cast<uint16_t*>(o->untyped_data());
  if (workspace->element_count() != 0) {
    DSV4_CHECK(Expect("workspace", *workspace, ffi::DataType::BF16,
                      {q.dimensions()[0], WorkspaceRows(p.a), kWidth}));
    if (!(scale > 0)) return Invalid("scale", std::to_string(scale), "above 0");
    auto* rows = static_cast<uint16_t*>(workspace->untyped_data());
    return CudaStatus(
        LaunchPrefill(stream, {p.a, rows, p.tiles, p.a.num_queries * p.tiles, p.o}));
  }
  if (heads_each != kTileRows) {
    return SparseAttentionInClusters(stream, p.a, p.o, heads_each, max_splits);
  }
  const int64_t num_items = int64_t{p.a.num_queries} * p.tiles * max_splits;
  if (max_splits < 1 || max_splits > kMaxParts || num_items > INT32_MAX) {
    return Invalid("max_splits", std::to_string(max_splits), "1 to 256, below 2^31 parts");
  }
  if (min_blocks < 1 || min_blocks > INT32_MAX) {
    return Invalid("min_blocks", std::to_string(min_blocks), "1 or more");
  }
  p.num_items = static_cast<int>(num_items);
  p.rule = {static_cast<int>(max_splits), static_cast<int>(min_blocks)};
  DSV4_CHECK(Expect("parts", *parts, ffi::DataType::F32,
                    {p.in_parts() ? num_items : 0, kTileRows, kWidth / 2 + 2}));
  p.parts = parts->typed_data<float>();
  return CudaStatus(Launch(stream, p));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_sparse_attention, SparseAttention,
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
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("layer")
                                  .Attr<int64_t>("pool_layer")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("ratio")
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("heads_each")
                                  .Attr<int64_t>("max_splits")
                                  .Attr<int64_t>("min_blocks"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
