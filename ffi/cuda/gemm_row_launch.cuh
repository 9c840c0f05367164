// Launches of gemm's kernel for one row.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dsv4/gemm.h"
#include "gemm_row.cuh"

namespace dsv4 {

// How a block of 2^units_log2 units is cut up; false if there are no such blocks. As many warps as
// possible share a unit, if each has inputs and not more than a quarter of their turns is wasted.
inline bool CutRow(int warps_log2, int blocks_per_row, int units_log2, RowSegment& segment) {
  int most = warps_log2;
  while (1 << most > blocks_per_row ||
         CeilDiv(blocks_per_row, 1 << most) << most > blocks_per_row * 5 / 4) {
    --most;
  }
  const int fewest = NumChunks(segment.gemm.format) == 2 ? 1 : 0;  // units of a warp
  segment.units_log2 = std::min(2, units_log2 + most - warps_log2);
  segment.k_warps_log2 = warps_log2 + segment.units_log2 - units_log2;
  return segment.units_log2 >= fewest && segment.k_warps_log2 >= 0;
}

// Segments as blocks that read as much each as possible, and not more blocks than `num_blocks`.
// Returns the number of blocks in a group; 0 if there is no such plan.
inline int PlanRow(const GemmCall& call, int warps_log2, int num_blocks, RowParams& params) {
  constexpr int kMostUnitsLog2 = 16;
  // Beyond, what a launch costs matters less than how well the weights stream.
  constexpr int64_t kMostBytes = 1 << 20;
  const int num_segments = static_cast<int>(call.segments.size());
  int units_log2[kMaxGemmSegments] = {};
  const auto rows = [&](int i) { return kWarpTileRows << units_log2[i]; };
  const auto outputs = [&](int i) { return call.segments[i].num_outputs / call.num_groups; };
  const auto grow = [&](int i) {
    while (++units_log2[i] <= kMostUnitsLog2) {
      if (CutRow(warps_log2, params.blocks_per_row, units_log2[i], params.segments[i])) return true;
    }
    return false;
  };
  for (int i = 0; i < num_segments; ++i) {
    params.segments[i].gemm = call.segments[i];
    params.segments[i].outputs_per_group = outputs(i);
    units_log2[i] = -1;
    if (!grow(i)) return 0;
  }
  for (;;) {
    int blocks = 0, least = 0;
    const auto bytes = [&](int i) {
      return int64_t{rows(i) / kWarpTileRows} * params.blocks_per_row *
             NumChunks(call.segments[i].format) * kChunkBytes;
    };
    for (int i = 0; i < num_segments; ++i) {
      if (call.num_groups > 1 && outputs(i) % rows(i) != 0) return 0;
      params.segments[i].first_block = blocks;
      blocks += CeilDiv(outputs(i), rows(i));
      if (bytes(i) < bytes(least)) least = i;
    }
    if (bytes(least) > kMostBytes) return 0;
    if (blocks * call.num_groups <= num_blocks) return blocks;
    if (!grow(least)) return 0;
  }
}

// False if the call does not fit.
template <int kWarpsLog2, WeightFormat... formats>
bool LaunchRow(const GemmCall& call, int num_blocks, cudaStream_t stream, cudaError_t& status) {
  RowParams params;
  params.x = call.x;
  params.width = call.width;
  params.blocks_per_row = CeilDiv(call.width, kBlockColumns);
  params.num_segments = static_cast<int>(call.segments.size());
  const int blocks = PlanRow(call, kWarpsLog2, num_blocks, params);
  if (blocks == 0) return false;
  constexpr int kSharedBytes = RowSharedBytes(kWarpsLog2, 2);
  static_assert(kSharedBytes <= 48 * 1024, "more has to be asked for");
  GemmRow<kWarpsLog2, formats...>
      <<<dim3(blocks, call.num_groups), 32 << kWarpsLog2, kSharedBytes, stream>>>(params);
  status = cudaGetLastError();
  return true;
}

}  // namespace dsv4
