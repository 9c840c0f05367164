// Launches of gemm's kernel for up to 64 rows on Hopper, and what they are likely to cost.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "dsv4/gemm.h"
#include "gemm_resident.cuh"

namespace dsv4 {

// How a launch is cut up, and what it costs.
struct ResidentPlan {
  int ranks, sharers_log2;  // blocks of a cluster and warpgroups that share inputs
  int max_blocks, tokens_at_once;
  ResidentParams::Part parts[2];
  int64_t cost = INT64_MAX;  // in bytes that a multiprocessor could read in the same time
};

// Segments of one format follow each other.
template <int kTokens, WeightFormat... formats>
ResidentPlan PlanResident(const GemmCall& call, int ranks, int sharers_log2, int num_blocks) {
  using Kernel = ResidentKernel<kTokens, formats...>;
  constexpr int kSharedBytes = 227 * 1024;
  // From the last block of a tile to the first of the next.
  constexpr int64_t kEndOfTile = 24 << 10;
  // Clusters of more do not fill all groups of multiprocessors.
  int clusters = ranks <= 2 ? num_blocks / ranks : num_blocks / 11 * 10 / ranks;
  const int tile_rows = Kernel::kGroups * kBlockRows >> sharers_log2;
  const int blocks_per_row = static_cast<int>(CeilDiv(call.width, kBlockColumns));
  ResidentPlan plan = {ranks, sharers_log2};
  plan.max_blocks = static_cast<int>(CeilDiv(blocks_per_row, ranks));
  plan.tokens_at_once = kTokens;
  while (Kernel::SharedBytes(plan.max_blocks, plan.tokens_at_once) > kSharedBytes) {
    plan.tokens_at_once /= 2;
    if (plan.tokens_at_once < Kernel::kTokenStep) return plan;
  }
  int part_index = 0, segment_index = 0;
  int64_t bytes[2] = {};
  for (const WeightFormat format : {formats...}) {
    ResidentParams::Part& part = plan.parts[part_index];
    part = {segment_index, segment_index};
    for (; part.end_segment < static_cast<int>(call.segments.size()); ++part.end_segment) {
      const GemmSegment& segment = call.segments[part.end_segment];
      if (segment.format != format) break;
      const int outputs = segment.num_outputs / call.num_groups;
      if (call.num_groups > 1 && outputs % tile_rows != 0) return plan;
      part.num_tiles += static_cast<int>(CeilDiv(segment.num_outputs, tile_rows));
    }
    segment_index = part.end_segment;
    bytes[part_index++] = int64_t{part.num_tiles} * CodeBytes(format);
  }
  // Clusters to parts by their bytes.
  const int64_t blocks = CeilDiv(plan.max_blocks, 1 << sharers_log2);
  const int64_t input_bytes = int64_t{plan.max_blocks} * Kernel::kInputBytes / 2;
  const int64_t sums = kTokens * Kernel::kGroups * kBlockRows * (ranks > 1 ? 4 : 2);
  const int64_t end_of_tile = kEndOfTile * (kTokens / plan.tokens_at_once) + sums;
  plan.cost = 0;
  part_index = 0;
  int first_cluster = 0;
  for (const WeightFormat format : {formats...}) {
    ResidentParams::Part& part = plan.parts[part_index];
    part.first_cluster = first_cluster;
    const bool is_last = ++part_index == sizeof...(formats);
    const int64_t all_bytes = std::max<int64_t>(1, bytes[0] + bytes[1]);
    const int fair = static_cast<int>(clusters * bytes[0] / all_bytes);
    part.num_clusters =
        std::min(part.num_tiles, is_last ? clusters - first_cluster : std::max(1, fair));
    if (part.num_clusters <= 0) return {ranks, sharers_log2};
    first_cluster += part.num_clusters;
    const int64_t rounds = CeilDiv(part.num_tiles, part.num_clusters);
    plan.cost = std::max(plan.cost, rounds * (blocks * Kernel::kGroups * CodeBytes(format) +
                                              end_of_tile) +
                                        input_bytes);
  }
  return plan;
}

template <int kTokens, WeightFormat... formats>
ResidentPlan PlanResident(const GemmCall& call, int num_blocks) {
  // Measured: with two formats clusters of four are faster than what the cost prefers.
  if (sizeof...(formats) == 2) return PlanResident<kTokens, formats...>(call, 4, 0, num_blocks);
  ResidentPlan best;
  const int blocks_per_row = static_cast<int>(CeilDiv(call.width, kBlockColumns));
  for (int ranks = 1; ranks <= 8 && ranks <= blocks_per_row; ranks *= 2) {
    for (int sharers_log2 = 0; sharers_log2 <= 2; ++sharers_log2) {
      const ResidentPlan plan =
          PlanResident<kTokens, formats...>(call, ranks, sharers_log2, num_blocks);
      if (plan.cost < best.cost) best = plan;
    }
  }
  return best;
}

template <int kTokens, WeightFormat... formats>
cudaError_t LaunchResident(const GemmCall& call, const ResidentPlan& plan, cudaStream_t stream) {
  using Kernel = ResidentKernel<kTokens, formats...>;
  const auto kernel = ResidentGemm<kTokens, formats...>;
  const int shared_bytes = Kernel::SharedBytes(plan.max_blocks, plan.tokens_at_once);
  // Of the current device.
  const cudaError_t prepared =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (prepared != cudaSuccess) return prepared;
  ResidentParams params;
  params.x = call.x;
  params.num_rows = call.num_rows;
  params.row_stride = call.num_groups * call.width;
  params.width = call.width;
  params.blocks_per_row = CeilDiv(call.width, kBlockColumns);
  params.sharers_log2 = plan.sharers_log2;
  params.max_blocks = plan.max_blocks;
  params.tokens_at_once = plan.tokens_at_once;
  const int tile_rows = Kernel::kGroups * kBlockRows >> plan.sharers_log2;
  int clusters = 0;
  for (size_t i = 0; i < sizeof...(formats); ++i) {
    const ResidentParams::Part& part = params.parts[i] = plan.parts[i];
    int first_tile = 0;
    for (int j = part.first_segment; j < part.end_segment; ++j) {
      const GemmSegment& gemm = call.segments[j];
      params.segments[j] = {gemm, gemm.num_outputs / call.num_groups, first_tile};
      first_tile += CeilDiv(gemm.num_outputs, tile_rows);
    }
    clusters += part.num_clusters;
  }
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(plan.ranks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.ranks, clusters);
  config.blockDim = dim3(Kernel::kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// Whether this kernel is faster than those for fewer and for more rows, as measured on an H200;
// then it is launched.
inline bool LaunchIfResident(const GemmCall& unsorted, int num_blocks, cudaStream_t stream,
                             cudaError_t& status) {
  using F = WeightFormat;
  if (unsorted.num_rows <= 8 || unsorted.num_rows > 64 || unsorted.num_groups > 1) return false;
  GemmCall call = unsorted;
  std::stable_sort(
      call.segments.begin(), call.segments.end(),
      [](const GemmSegment& a, const GemmSegment& b) { return a.format < b.format; });
  const auto launch = [&](auto tokens, auto... formats) {
    constexpr int kTokens = decltype(tokens)::value;
    const ResidentPlan plan = PlanResident<kTokens, decltype(formats)::value...>(call, num_blocks);
    const bool is_fp4 = call.segments.back().format <= F::kNvfp4;
    if (plan.cost == INT64_MAX || (is_fp4 && plan.ranks > 1)) return false;
    status = LaunchResident<kTokens, decltype(formats)::value...>(call, plan, stream);
    return true;
  };
  const F first = call.segments.front().format, last = call.segments.back().format;
  constexpr std::integral_constant<int, 16> k16;
  if (first == F::kFp8Block && last == F::kBf16) {
    constexpr FormatConstant<F::kFp8Block> fp8;
    constexpr FormatConstant<F::kBf16> bf16;
    if (call.num_rows <= 16) return launch(k16, fp8, bf16);
    if (call.num_rows <= 32) return launch(std::integral_constant<int, 32>(), fp8, bf16);
    return launch(std::integral_constant<int, 64>(), fp8, bf16);
  }
  if (call.num_rows > 16 || first != last) return false;
  switch (first) {
    case F::kMxfp4: return launch(k16, FormatConstant<F::kMxfp4>());
    case F::kNvfp4: return launch(k16, FormatConstant<F::kNvfp4>());
    case F::kFp8Block: return launch(k16, FormatConstant<F::kFp8Block>());
    case F::kBf16: return false;
  }
  return false;
}

}  // namespace dsv4
