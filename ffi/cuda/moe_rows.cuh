// What the expert kernels do to rows between and after products.
#pragma once

#include "moe_problem.cuh"

namespace dsv4 {

// Q1 of a block's hidden rows, a warp for each group of 128 in whatever order they stand.
template <typename Shape>
__device__ void RoundHidden(const MoeProblem& p, const Item& item) {
  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  WaitFor(p.hidden_done + item.block, p.f / Shape::kHiddenOutputs * kConsumerWarps);
  int groups = item.num_rows * (p.f / kBlockColumns);
  uint16_t* rows = p.hidden + int64_t{item.first_row} * p.f;
  for (int group = warp; group < groups; group += kConsumerWarps) {
    uint2* at = reinterpret_cast<uint2*>(rows + int64_t{group} * kBlockColumns) + lane;
    uint2 rounded = RoundGroup(__ldcg(at));
    *at = Shape::kWarpProducts ? ScaleInputs(rounded) : rounded;
  }
  __syncwarp();
  if (lane == 0) Signal(p.rounded + item.block);
}

// 64 columns of up to 64 tokens.
template <typename Shape>
__device__ void Combine(const MoeProblem& p, const Item& item) {
  constexpr int kAtOnce = 8;
  int tile = item.tile * kCombineColumns / Shape::kDownOutputs;
  int token = item.block * kCombineTokens + threadIdx.x / 8;
  int column = item.tile * kCombineColumns + threadIdx.x % 8 * 8;
  bool exists = token < p.num_tokens;
  float sum[8] = {};
  for (int first = 0; first < p.top_k; first += kAtOnce) {
    int rows[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      bool is_route = exists && first + k < p.top_k;
      rows[k] = is_route ? p.plan.row_of_route[token * p.top_k + first + k] : -1;
    }
    if (first == 0) WaitFor(p.columns_done + tile, *p.plan.num_blocks * kConsumerWarps);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      if (rows[k] < 0) continue;
      uint4 y = __ldcg(reinterpret_cast<const uint4*>(p.y + int64_t{rows[k]} * p.d + column));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t pair = (&y.x)[i];
        sum[2 * i] += __uint_as_float(pair << 16);
        sum[2 * i + 1] += __uint_as_float(pair & 0xffff0000u);
      }
    }
  }
  if (!exists) return;
  float4* out = reinterpret_cast<float4*>(p.out + int64_t{token} * p.d + column);
  out[0] = {sum[0], sum[1], sum[2], sum[3]};
  out[1] = {sum[4], sum[5], sum[6], sum[7]};
}

}  // namespace dsv4
