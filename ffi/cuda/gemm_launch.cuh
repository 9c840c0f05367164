// Launches of gemm's kernels, and what they are likely to cost.
#pragma once

#include <algorithm>

#include "dsv4/gemm.h"
#include "gemm_stream.cuh"

namespace dsv4 {

// How the warps of a block are shared out, and the launch's cost.
struct StreamPlan {
  int unit_warps_log2;
  int64_t cost;  // in bytes that a multiprocessor could read in the same time
};

template <int kWarps, int kRowTiles>
StreamPlan PlanStream(const GemmCall& call, int num_blocks) {
  // About 0.7 us from the last block of a tile to the first of the next.
  constexpr int64_t kEndOfTile = 24 << 10;
  StreamPlan best = {0, INT64_MAX};
  for (int log2 = 0; 1 << log2 <= kWarps; ++log2) {
    const int tile_rows = kWarps * kRowTiles * kWarpTileRows >> log2;
    int64_t tiles = 0, block_bytes = 0;
    for (const GemmSegment& segment : call.segments) {
      tiles += CeilDiv(segment.num_outputs, tile_rows);
      block_bytes = std::max<int64_t>(block_bytes, CodeBytes(segment.format));
    }
    const int64_t turns = CeilDiv(CeilDiv(call.width, kBlockColumns), 1 << log2);
    const int64_t bytes = turns * kWarps * kRowTiles * (block_bytes / kWarpTilesPerBlock);
    const int64_t cost = CeilDiv(tiles, num_blocks) * (bytes + kEndOfTile);
    if (cost <= best.cost) best = {log2, cost};
  }
  return best;
}

template <int kWarps, int kRowTiles, int kStages, int kTokenTiles, WeightFormat... formats>
cudaError_t LaunchStream(const GemmCall& call, StreamPlan plan, int num_blocks,
                         cudaStream_t stream) {
  using Kernel = StreamKernel<kWarps, kRowTiles, kStages, kTokenTiles, formats...>;
  const auto kernel = StreamGemm<kWarps, kRowTiles, kStages, kTokenTiles, formats...>;
  // Of the current device.
  const cudaError_t prepared = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(typename Kernel::Shared));
  if (prepared != cudaSuccess) return prepared;
  StreamParams params;
  params.x = call.x;
  params.num_rows = call.num_rows;
  params.row_stride = call.num_groups * call.width;
  params.width = call.width;
  params.blocks_per_row = CeilDiv(call.width, kBlockColumns);
  params.unit_warps_log2 = plan.unit_warps_log2;
  params.num_tiles = 0;
  params.num_segments = 0;
  const int tile_rows = kWarps * Kernel::kUnitRows >> plan.unit_warps_log2;
  for (const GemmSegment& gemm : call.segments) {
    params.segments[params.num_segments++] = {gemm, gemm.num_outputs / call.num_groups,
                                              params.num_tiles};
    params.num_tiles += CeilDiv(gemm.num_outputs, tile_rows);
  }
  kernel<<<std::min(params.num_tiles, num_blocks), kWarps * 32, sizeof(typename Kernel::Shared),
           stream>>>(params);
  return cudaGetLastError();
}

}  // namespace dsv4
