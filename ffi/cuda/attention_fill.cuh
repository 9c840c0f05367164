// Fills the workspace of sparse attention from records.
#pragma once

#include "attention_workspace.cuh"
#include "cache_load.cuh"

namespace dsv4 {

// The record of a workspace's row; null for a row that stands for nothing.
__device__ __forceinline__ Location RecordOfRow(const Attention& a, int sequence, int64_t row) {
  const int id = static_cast<int>(row) - (a.window - 1 + a.tokens);
  if (row >= WorkspaceRows(a)) return {};
  if (id < 0) {
    const int start = __ldg(a.start + sequence), position = start + a.tokens + id;
    return Found(a, FindSlot(a, {0, sequence, start, position, a.window}, a.window - 1));
  }
  Search search = {{}, sequence, id, 0, true};
  FindBlock(a, &search);
  return search.block < 0 ? Location{} : Found(a, search);
}

// A warp for each row of the sequence `blockIdx.y`. Those that stand for nothing stay as they are.
constexpr int kFillWarps = 8;

__global__ void __launch_bounds__(32 * kFillWarps)
    FillWorkspace(const __grid_constant__ PrefillProblem p) {
  constexpr int kLaneChannels = 8;
  asm volatile("griddepcontrol.launch_dependents;");
  const int lane = threadIdx.x % 32, sequence = blockIdx.y;
  const int64_t row = int64_t{blockIdx.x} * kFillWarps + threadIdx.x / 32;
  const Location at = RecordOfRow(p.a, sequence, row);
  if (at.body == nullptr) return;
  auto load = [&](int channel) {
    return LoadChannels<EntryFormat::kRecord>(at.body, at.scales, channel);
  };
  const uint4 low = load(lane * kLaneChannels);
  const uint4 high = load(kWidth / 2 + lane * kLaneChannels);
  auto* to = reinterpret_cast<uint4*>(
                 p.workspace + (sequence * WorkspaceRows(p.a) + row) * kWidth) + lane;
  to[0] = low;
  to[32] = high;
}

}  // namespace dsv4
