// Routed experts on tcgen05: what stands before, between and behind the products of
// decoded_gemm_sm100.cuh.
#pragma once

#include "decoded_gemm_sm100.cuh"

namespace dsv4::sm100 {

// What comes in: routes of tokens, or the sizes of groups of rows that are sorted already.
struct ExpertRows {
  const int32_t* expert_ids;   // [num_tokens, top_k]
  const bool* valid;           // [num_tokens]
  const float* weights;        // [num_tokens, top_k]
  const int32_t* group_sizes;  // [num_experts] and no ids, with top_k 1
  int32_t num_tokens, top_k, num_experts, tile_rows;
  // What goes out: blocks of rows of one expert each, and where rows come from and go to.
  RowBlock* blocks;
  int32_t* num_blocks;
  int32_t* source_of_row;  // the token
  float* weight_of_row;
  int32_t* row_of_route;   // -1 for a route that takes no part
};

constexpr int32_t kPlanThreads = 1024;  // and as many experts at most

__device__ __forceinline__ int32_t ExpertOfRoute(const ExpertRows& p, int32_t route) {
  const int32_t expert = p.expert_ids[route];
  const bool known = expert >= 0 && expert < p.num_experts;
  return known && p.valid[route / p.top_k] ? expert : -1;
}

// One block. Which row of its expert a route gets does not matter: rows do not touch each other's
// results.
__global__ void __launch_bounds__(kPlanThreads) PlanExperts(const __grid_constant__ ExpertRows p) {
  __shared__ int32_t next_row[kPlanThreads];
  __shared__ int2 ends[kPlanThreads];  // of the experts' rows and blocks
  const int32_t expert = threadIdx.x;
  const bool sorted = p.group_sizes != nullptr;
  const int32_t num_routes = sorted ? 0 : p.num_tokens * p.top_k;
  const bool has_group = sorted && expert < p.num_experts;
  next_row[expert] = has_group ? min(max(p.group_sizes[expert], 0), p.num_tokens) : 0;
  __syncthreads();
  for (int32_t route = threadIdx.x; route < num_routes; route += kPlanThreads) {
    const int32_t chosen = ExpertOfRoute(p, route);
    if (chosen >= 0) atomicAdd(&next_row[chosen], 1);
  }
  __syncthreads();
  const int32_t size = next_row[expert], num_blocks = (size + p.tile_rows - 1) / p.tile_rows;
  int2 end = {size, num_blocks};
  for (int32_t distance = 1; distance < kPlanThreads; distance *= 2) {
    ends[expert] = end;
    __syncthreads();
    if (expert >= distance) {
      end.x += ends[expert - distance].x;
      end.y += ends[expert - distance].y;
    }
    __syncthreads();
  }
  // Sizes that add up to more rows than there are must not lead outside of the arrays.
  const int32_t last = min(end.x, p.num_tokens * p.top_k);
  next_row[expert] = end.x - size;
  for (int32_t i = 0; i < num_blocks; ++i) {
    const int32_t first = end.x - size + i * p.tile_rows;
    if (first >= last) {
      end.y = end.y - num_blocks + i;
      break;
    }
    p.blocks[end.y - num_blocks + i] = {expert, first, min(last - first, p.tile_rows), 0};
  }
  if (expert == kPlanThreads - 1) *p.num_blocks = end.y;
  __syncthreads();
  for (int32_t route = threadIdx.x; route < num_routes; route += kPlanThreads) {
    const int32_t chosen = ExpertOfRoute(p, route);
    const int32_t row = chosen < 0 ? -1 : atomicAdd(&next_row[chosen], 1);
    p.row_of_route[route] = row;
    if (row < 0) continue;
    p.source_of_row[row] = route / p.top_k;
    p.weight_of_row[row] = p.weights[route];
  }
}

// The sink of gate and up projections: tiles of the hidden state, the next product's input.
struct StoreHidden {
  static constexpr bool kPairs = true;
  uint8_t* tiles;
  const float* weight_of_row;
  int32_t width;
  float limit;

  __device__ void operator()(const RowBlock& rows, int32_t row, int32_t output, float gate,
                             float up) const {
    gate = FromBfloat16(ToBfloat16(gate));
    up = FromBfloat16(ToBfloat16(up));
    // NaN stays NaN.
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    const float silu = __fdividef(gate, 1 + __expf(-gate));
    const float hidden = silu * up * weight_of_row[rows.first_row + row];
    constexpr int32_t kHalf = kBlockColumns / 2;
    uint8_t* tile = tiles + InputTileOffset(rows, 1, 0, width / kBlockColumns,
                                            output / kBlockColumns);
    tile += output % kBlockColumns / kHalf * rows.num_rows * 128;
    const int32_t place = PartOffset(row, output % kHalf / 8) + output % 8 * 2;
    *reinterpret_cast<uint16_t*>(tile + place) = ToBfloat16(hidden);
  }
};

struct RouteSums {
  const uint16_t* y;  // bfloat16 [rows, width]
  const int32_t* row_of_route;
  float* out;  // [num_tokens, width]
  int32_t num_tokens, top_k, width;
};

constexpr int32_t kSumThreads = 256, kSumColumns = 8;

// A thread for eight columns of a token.
__global__ void __launch_bounds__(kSumThreads) SumRoutes(const __grid_constant__ RouteSums p) {
  const int64_t item = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  const int32_t per_token = p.width / kSumColumns;
  const int64_t token = item / per_token, column = item % per_token * kSumColumns;
  if (token >= p.num_tokens) return;
  float sums[kSumColumns] = {};
  for (int32_t k = 0; k < p.top_k; ++k) {
    const int32_t row = p.row_of_route[token * p.top_k + k];
    if (row < 0) continue;
    const uint4 y = *reinterpret_cast<const uint4*>(p.y + int64_t{row} * p.width + column);
    const uint32_t words[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int32_t i = 0; i < kSumColumns; ++i) {
      sums[i] += FromBfloat16(static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2))));
    }
  }
  auto* out = reinterpret_cast<float4*>(p.out + token * p.width + column);
  out[0] = {sums[0], sums[1], sums[2], sums[3]};
  out[1] = {sums[4], sums[5], sums[6], sums[7]};
}

// Rows behind the last group, of which no product tells.
__global__ void __launch_bounds__(kSumThreads)
    ClearUnusedRows(const RowBlock* blocks, const int32_t* num_blocks, uint16_t* y,
                    int64_t num_rows, int64_t width) {
  const int32_t count = *num_blocks;
  const int64_t used = count > 0 ? blocks[count - 1].first_row + blocks[count - 1].num_rows : 0;
  int64_t i = used * width + int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  for (; i < num_rows * width; i += int64_t{gridDim.x} * kSumThreads) y[i] = 0;
}

}  // namespace dsv4::sm100
