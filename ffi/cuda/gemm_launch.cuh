// Launches of gemm's kernels, and what they are likely to cost.
#pragma once

#include <algorithm>
#include <utility>

#include "dsv4/gemm.h"
#include "gemm_stream.cuh"
#include "gemm_tiled.cuh"

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

// The workspace's copies, of which those that no segment reads become null. Rounded inputs are
// codes if all weights that meet them are FP8.
inline InputTiles TilesOf(const GemmCall& call, bool allow_codes) {
  InputTiles tiles = {};
  tiles.x = call.x;
  tiles.num_rows = call.num_rows;
  tiles.num_groups = call.num_groups;
  tiles.width = call.width;
  tiles.blocks_per_row = CeilDiv(call.width, kBlockColumns);
  tiles.row_tiles = CeilDiv(call.num_rows, 8);
  bool rounds = false, plain = false, all_fp8 = allow_codes;
  for (const GemmSegment& segment : call.segments) {
    (segment.round_input ? rounds : plain) = true;
    all_fp8 = all_fp8 && (!segment.round_input || segment.format == WeightFormat::kFp8Block);
  }
  uint8_t* rounded = call.workspace;
  if (plain) tiles.plain = std::exchange(rounded, rounded + GemmCopyBytes(call));
  if (rounds && all_fp8) {
    tiles.codes = rounded;
    tiles.scales = reinterpret_cast<float*>(rounded + GemmCopyBytes(call) / 2);
  } else if (rounds) {
    tiles.rounded = rounded;
  }
  return tiles;
}

inline cudaError_t LaunchTileInputs(const InputTiles& tiles, cudaStream_t stream) {
  const int64_t items = int64_t{tiles.row_tiles} * 8 * tiles.num_groups * tiles.blocks_per_row;
  TileInputs<<<CeilDiv(items * 16, kInputThreads), kInputThreads, 0, stream>>>(tiles);
  return cudaGetLastError();
}

// How many blocks split the inputs or share the input rows, and the launch's cost.
struct TiledPlan {
  int ranks, sharers;
  int64_t cost;  // in sixteenths of the time of 64 x 16 x 128 products
};

inline TiledPlan PlanTiled(const GemmSegment& gemm, const InputTiles& tiles, int tokens,
                           int num_blocks) {
  const int64_t row_tiles = CeilDiv(gemm.num_outputs, 2 * kBlockRows);
  const int64_t outputs = row_tiles * CeilDiv(tiles.num_rows, tokens);
  // Groups have inputs of their own.
  const bool shares = tiles.num_groups == 1 && row_tiles % 2 == 0;
  TiledPlan best = {1, 1, INT64_MAX};
  for (int ranks = 1; ranks <= 8 && ranks <= tiles.blocks_per_row; ranks *= 2) {
    // A step has a part that does not depend on the tile; so has a tile, and adding up costs too.
    const int64_t steps = CeilDiv(tiles.blocks_per_row, ranks) * (tokens + 48);
    const int64_t end = 2 * tokens + 200 + (ranks > 1 ? 4 * tokens : 0);
    const int64_t cost = CeilDiv(outputs * ranks, num_blocks) * (steps + end);
    if (cost < best.cost) best = {ranks, ranks == 1 && shares ? 2 : 1, cost};
  }
  return best;
}

template <WeightFormat format, int kTokens, bool kCodes = false>
cudaError_t LaunchTiled(const GemmSegment& gemm, const InputTiles& tiles, const TiledPlan& plan,
                        cudaStream_t stream) {
  using Kernel = TiledKernel<format, kTokens, kCodes>;
  const auto kernel = TiledGemm<format, kTokens, kCodes>;
  // Of the current device.
  const cudaError_t prepared = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(typename Kernel::Shared));
  if (prepared != cudaSuccess) return prepared;
  const TiledParams params = {gemm,
                              kCodes             ? tiles.codes
                              : gemm.round_input ? tiles.rounded
                                                 : tiles.plain,
                              tiles.scales,
                              tiles.num_rows,
                              tiles.row_tiles,
                              tiles.blocks_per_row,
                              gemm.num_outputs / tiles.num_groups,
                              plan.sharers > 1};
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  const int cluster_blocks = plan.ranks * plan.sharers;
  cluster.val.clusterDim = {static_cast<unsigned>(cluster_blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cluster_blocks, CeilDiv(tiles.num_rows, kTokens),
                        CeilDiv(gemm.num_outputs, Kernel::kRows * plan.sharers));
  config.blockDim = dim3(Kernel::kThreads);
  config.dynamicSmemBytes = sizeof(typename Kernel::Shared);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace dsv4
