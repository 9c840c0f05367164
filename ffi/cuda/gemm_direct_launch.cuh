// Launches of gemm's kernel for up to 64 rows, and what they are likely to cost.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dsv4/gemm.h"
#include "gemm_direct.cuh"

namespace dsv4 {

// How a launch is cut up, and what it costs.
struct DirectPlan {
  int ranks_log2, unit_warps_log2;
  int max_blocks, shared_bytes;
  DirectParams::Part parts[kMaxDirectParts];
  int64_t cost = INT64_MAX;  // in bytes that a multiprocessor could read in the same time
};

// Segments of one format follow each other.
template <int kWarps, int kTokenTiles, int kChunks, WeightFormat... formats>
DirectPlan PlanDirect(const GemmCall& call, int ranks_log2, int unit_warps_log2, int num_blocks) {
  using Kernel = DirectKernel<kWarps, kTokenTiles, kChunks, formats...>;
  constexpr int kSharedBytes = 227 * 1024;
  // From the last block of a tile to the first of the next, and more for each warp of a unit and
  // in clusters.
  constexpr int64_t kEndOfTile = 16 << 10, kWarpEnd = 1 << 10, kClusterEnd = 6 << 10;
  const int ranks = 1 << ranks_log2;
  // Clusters of more do not fill all groups of multiprocessors.
  const int clusters = ranks <= 2 ? num_blocks / ranks : num_blocks / 11 * 10 / ranks;
  const int blocks_per_row = static_cast<int>(CeilDiv(call.width, kBlockColumns));
  DirectPlan plan = {ranks_log2, unit_warps_log2};
  const int num_tokens = std::min<int>(call.num_rows, Kernel::kTokens);
  const int token_groups = static_cast<int>(CeilDiv(call.num_rows, Kernel::kTokens));
  plan.max_blocks = static_cast<int>(CeilDiv(blocks_per_row, ranks));
  plan.shared_bytes = Kernel::SharedBytes(plan.max_blocks, ranks, unit_warps_log2);
  if (plan.shared_bytes > kSharedBytes) return plan;
  int part_index = 0, segment_index = 0;
  int64_t tile_bytes[kMaxDirectParts] = {}, ends[kMaxDirectParts] = {}, all_bytes = 0;
  const int64_t turns = CeilDiv(plan.max_blocks, 1 << unit_warps_log2);
  for (const WeightFormat format : {formats...}) {
    const int tile_rows = Kernel::TileRows(format, unit_warps_log2);
    if (tile_rows / ranks < 4) return plan;
    DirectParams::Part& part = plan.parts[part_index];
    part = {segment_index, segment_index};
    for (; part.end_segment < static_cast<int>(call.segments.size()); ++part.end_segment) {
      const GemmSegment& segment = call.segments[part.end_segment];
      if (segment.format != format) break;
      const int outputs = segment.num_outputs / call.num_groups;
      if (call.num_groups > 1 && outputs % tile_rows != 0) return plan;
      part.num_tiles += static_cast<int>(CeilDiv(segment.num_outputs, tile_rows)) * token_groups;
    }
    segment_index = part.end_segment;
    tile_bytes[part_index] = turns * kWarps * Kernel::RowTiles(format) *
                             (CodeBytes(format) / kWarpTilesPerBlock);
    ends[part_index] = kEndOfTile + (kWarpEnd << unit_warps_log2) +
                       (ranks > 1 ? kClusterEnd + tile_rows * num_tokens * 4 : 0);
    all_bytes += part.num_tiles * (tile_bytes[part_index] + ends[part_index]);
    ++part_index;
  }
  // Clusters to parts by their bytes.
  plan.cost = 0;
  int first_cluster = 0;
  for (int i = 0; i < part_index; ++i) {
    DirectParams::Part& part = plan.parts[i];
    part.first_cluster = first_cluster;
    const int left = clusters - first_cluster;
    const int64_t bytes = part.num_tiles * (tile_bytes[i] + ends[i]);
    const int fair = all_bytes == 0 ? 0 : static_cast<int>(left * bytes / all_bytes);
    part.num_clusters = std::min(part.num_tiles, std::max(part.num_tiles > 0 ? 1 : 0, fair));
    if (part.num_clusters > left) return {ranks_log2, unit_warps_log2};
    first_cluster += part.num_clusters;
    all_bytes -= bytes;
  }
  // Fewer blocks have more of the memory to themselves, but decode FP4 weights no faster.
  const int busy = num_blocks + (first_cluster << ranks_log2);
  part_index = 0;
  for (const WeightFormat format : {formats...}) {
    const DirectParams::Part& part = plan.parts[part_index];
    int64_t tile_cost = tile_bytes[part_index];
    if (format == WeightFormat::kFp8Block) tile_cost = tile_cost * busy / (2 * num_blocks);
    const int64_t rounds = part.num_tiles == 0 ? 0 : CeilDiv(part.num_tiles, part.num_clusters);
    plan.cost = std::max(plan.cost, rounds * (tile_cost + ends[part_index++]));
  }
  // Weights wait for inputs, the more if these are rounded first.
  bool rounding = false;
  for (const GemmSegment& segment : call.segments) rounding = rounding || segment.round_input;
  const int64_t input_bytes = int64_t{plan.max_blocks} * num_tokens * kBlockColumns * 2;
  plan.cost += input_bytes * (rounding ? 4 : 3) / 2;
  return plan;
}

template <int kWarps, int kTokenTiles, int kChunks, WeightFormat... formats>
DirectPlan PlanDirect(const GemmCall& call, int num_blocks) {
  DirectPlan best;
  for (int ranks_log2 = 0; ranks_log2 <= 3; ++ranks_log2) {
    for (int log2 = 0; 1 << log2 <= kWarps; ++log2) {
      const DirectPlan plan =
          PlanDirect<kWarps, kTokenTiles, kChunks, formats...>(call, ranks_log2, log2, num_blocks);
      if (plan.cost < best.cost) best = plan;
    }
  }
  return best;
}

template <int kWarps, int kTokenTiles, int kChunks, WeightFormat... formats>
cudaError_t LaunchDirect(const GemmCall& call, const DirectPlan& plan, cudaStream_t stream) {
  using Kernel = DirectKernel<kWarps, kTokenTiles, kChunks, formats...>;
  const auto kernel = DirectGemm<kWarps, kTokenTiles, kChunks, formats...>;
  // Of the current device.
  const cudaError_t prepared =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (prepared != cudaSuccess) return prepared;
  DirectParams params;
  params.x = call.x;
  params.num_rows = call.num_rows;
  params.row_stride = call.num_groups * call.width;
  params.width = call.width;
  params.blocks_per_row = CeilDiv(call.width, kBlockColumns);
  params.ranks_log2 = plan.ranks_log2;
  params.unit_warps_log2 = plan.unit_warps_log2;
  params.max_blocks = plan.max_blocks;
  params.part_log2 = 0;
  while (Kernel::kParts << params.part_log2 < plan.max_blocks) ++params.part_log2;
  params.groups_log2 = call.num_rows > Kernel::kTokens;
  int clusters = 0, part_index = 0;
  for (const WeightFormat format : {formats...}) {
    const DirectParams::Part& part = params.parts[part_index] = plan.parts[part_index];
    const int tile_rows = Kernel::TileRows(format, plan.unit_warps_log2);
    int first_tile = 0;
    for (int i = part.first_segment; i < part.end_segment; ++i) {
      const GemmSegment& gemm = call.segments[i];
      params.segments[i] = {gemm, gemm.num_outputs / call.num_groups, first_tile};
      first_tile += CeilDiv(gemm.num_outputs, tile_rows);
    }
    clusters += part.num_clusters;
    ++part_index;
  }
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {1u << plan.ranks_log2, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1 << plan.ranks_log2, clusters);
  config.blockDim = dim3(Kernel::kThreads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = plan.ranks_log2 > 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

template <int kWarps, int kTokenTiles, int kChunks, WeightFormat... formats>
cudaError_t LaunchDirect(const GemmCall& call, int num_blocks, cudaStream_t stream) {
  const DirectPlan plan = PlanDirect<kWarps, kTokenTiles, kChunks, formats...>(call, num_blocks);
  // Inputs too wide for the shared memory of eight blocks.
  if (plan.cost == INT64_MAX) return cudaErrorInvalidValue;
  return LaunchDirect<kWarps, kTokenTiles, kChunks, formats...>(call, plan, stream);
}

}  // namespace dsv4
