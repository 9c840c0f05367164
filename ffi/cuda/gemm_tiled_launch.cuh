// Launches of the kernels for many rows, and what they are likely to cost.
#pragma once

#include <algorithm>
#include <utility>

#include "dsv4/gemm.h"
#include "gemm_tiled.cuh"
#include "tile_inputs.cuh"

namespace dsv4 {

// From so many rows on, FP8 inputs pay.
constexpr int kMinCodedRows = 65;

// The workspace's copies, of which those that no segment reads become null. Rounded inputs are
// codes if all weights that meet them are FP8; FP4 weights meet bfloat16 inputs in less time.
inline InputTiles TilesOf(const GemmCall& call) {
  InputTiles tiles = {};
  tiles.x = call.x;
  tiles.num_rows = call.num_rows;
  tiles.num_groups = call.num_groups;
  tiles.width = call.width;
  tiles.blocks_per_row = CeilDiv(call.width, kBlockColumns);
  tiles.row_tiles = CeilDiv(call.num_rows, 8);
  bool rounds = false, plain = false, coded = call.num_rows >= kMinCodedRows;
  for (const GemmSegment& segment : call.segments) {
    (segment.round_input ? rounds : plain) = true;
    coded = coded && (!segment.round_input || segment.format == WeightFormat::kFp8Block);
  }
  uint8_t* rounded = call.workspace;
  if (plain) tiles.plain = std::exchange(rounded, rounded + GemmCopyBytes(call));
  if (rounds && coded) {
    tiles.codes = rounded;
    tiles.scales = reinterpret_cast<float*>(rounded + GemmCopyBytes(call) / 2);
  } else if (rounds) {
    tiles.rounded = rounded;
  }
  return tiles;
}

inline cudaError_t LaunchTileInputs(const InputTiles& tiles, cudaStream_t stream) {
  const dim3 grid(tiles.row_tiles, CeilDiv(tiles.blocks_per_row, kInputBlocks), tiles.num_groups);
  TileInputs<<<grid, kInputThreads, 0, stream>>>(tiles);
  return cudaGetLastError();
}

// How many blocks split the inputs, and the launch's cost.
struct TiledPlan {
  int ranks;
  int64_t cost;  // in nanoseconds
};

// All times are measured on an H200.
inline TiledPlan PlanTiled(const GemmSegment& gemm, const InputTiles& tiles, int tokens, bool codes,
                           int num_blocks) {
  const int64_t num_tiles =
      CeilDiv(gemm.num_outputs, 2 * kBlockRows) * CeilDiv(tiles.num_rows, tokens);
  int64_t step = std::max(520, 44 * tokens / 10 + 100);
  if (codes) step = gemm.format == WeightFormat::kFp8Block ? 36 * tokens / 10 + 180
                                                           : 33 * tokens / 10 + 730;
  TiledPlan best = {1, INT64_MAX};
  for (int ranks = 1; ranks <= kMaxRanks && ranks <= tiles.blocks_per_row; ranks *= 2) {
    // Larger clusters do not fit onto all multiprocessors.
    const int num_clusters = (ranks > 2 ? num_blocks * 10 / 11 : num_blocks) / ranks;
    const int64_t end = 10 * tokens + (ranks > 1 ? 2500 + 250 * ranks : 0);
    const int64_t cost = CeilDiv(num_tiles, num_clusters) *
                         (CeilDiv(tiles.blocks_per_row, ranks) * step + end);
    if (cost < best.cost) best = {ranks, cost};
  }
  return best;
}

template <WeightFormat format, int kTokens, bool kCodes>
cudaError_t LaunchTiled(const GemmSegment& gemm, const InputTiles& tiles, const TiledPlan& plan,
                        int num_blocks, cudaStream_t stream) {
  using Kernel = TiledKernel<format, kTokens, kCodes>;
  const auto kernel = TiledGemm<format, kTokens, kCodes>;
  // Of the current device.
  const cudaError_t prepared = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(typename Kernel::Shared));
  if (prepared != cudaSuccess) return prepared;
  TiledParams params;
  params.gemm = gemm;
  params.inputs = kCodes ? tiles.codes : gemm.round_input ? tiles.rounded : tiles.plain;
  params.input_scales = tiles.scales;
  params.num_rows = tiles.num_rows;
  params.row_tiles = tiles.row_tiles;
  params.blocks_per_row = tiles.blocks_per_row;
  params.outputs_per_group = gemm.num_outputs / tiles.num_groups;
  params.token_tiles = CeilDiv(tiles.num_rows, kTokens);
  params.num_tiles = params.token_tiles * CeilDiv(gemm.num_outputs, Kernel::kRows);
  params.ranks = plan.ranks;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(plan.ranks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.ranks * std::min(params.num_tiles, num_blocks / plan.ranks));
  config.blockDim = dim3(Kernel::kThreads);
  config.dynamicSmemBytes = sizeof(typename Kernel::Shared);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// The tile of input rows that costs least.
template <WeightFormat format, bool kCodes, int kTokens, int... kMore>
cudaError_t TiledBest(const GemmSegment& gemm, const InputTiles& tiles, int num_blocks,
                      cudaStream_t stream) {
  const auto best = [&](int tokens) { return PlanTiled(gemm, tiles, tokens, kCodes, num_blocks); };
  const TiledPlan plan = best(kTokens);
  if constexpr (sizeof...(kMore) > 0) {
    if (std::min({best(kMore).cost...}) < plan.cost) {
      return TiledBest<format, kCodes, kMore...>(gemm, tiles, num_blocks, stream);
    }
  }
  return LaunchTiled<format, kTokens, kCodes>(gemm, tiles, plan, num_blocks, stream);
}

template <WeightFormat format>
cudaError_t Tiled(const GemmSegment& gemm, const InputTiles& tiles, int num_blocks,
                  cudaStream_t stream) {
  if constexpr (format == WeightFormat::kFp8Block || format == WeightFormat::kMxfp4) {
    if (gemm.round_input && tiles.codes != nullptr) {
      return TiledBest<format, true, 64, 128, 256>(gemm, tiles, num_blocks, stream);
    }
  }
  return TiledBest<format, false, 32, 64, 128, 256>(gemm, tiles, num_blocks, stream);
}

inline cudaError_t Tiled(const GemmSegment& gemm, const InputTiles& tiles, int num_blocks,
                         cudaStream_t stream) {
  switch (gemm.format) {
    case WeightFormat::kMxfp4: return Tiled<WeightFormat::kMxfp4>(gemm, tiles, num_blocks, stream);
    case WeightFormat::kNvfp4: return Tiled<WeightFormat::kNvfp4>(gemm, tiles, num_blocks, stream);
    case WeightFormat::kFp8Block:
      return Tiled<WeightFormat::kFp8Block>(gemm, tiles, num_blocks, stream);
    case WeightFormat::kBf16: break;
  }
  return Tiled<WeightFormat::kBf16>(gemm, tiles, num_blocks, stream);
}

inline cudaError_t Tiled(const GemmCall& call, int num_blocks, cudaStream_t stream) {
  const InputTiles tiles = TilesOf(call);
  cudaError_t status = LaunchTileInputs(tiles, stream);
  for (const GemmSegment& gemm : call.segments) {
    if (status == cudaSuccess) status = Tiled(gemm, tiles, num_blocks, stream);
  }
  return status;
}

}  // namespace dsv4
