// What every block of the expert kernels knows: rows sorted by expert, cut into blocks of one
// expert; and the rows of x in the order in which `weight_tiles.cuh` takes inputs.
#pragma once

#include <cstdint>

#include "dsv4/formats.h"
#include "dsv4/tiled.h"
#include "round_input.cuh"
#include "scaled_sums.cuh"

namespace dsv4 {

constexpr int kWarp = 32;

struct RowBlock {
  int expert, first_row, num_rows, unused;
};

// In global memory, written by Prepare. The counters start at zero.
struct Plan {
  RowBlock* blocks;
  int* source_of_row;    // the row of x
  float* weight_of_row;  // the routing weight
  int* row_of_route;     // [tokens * top_k]; -1 for a route that takes no part
  int* num_blocks;
  int* counters;
  int num_counters;
};

// Where an input stands in rows that warpgroups multiply: in a block of 128 the steps follow each
// other, and in a step the first and then the second pairs of the four shares.
__device__ __forceinline__ int OrderedInput(int input) {
  int share = input % kBlockColumns / 32, step = input % 32 / 4, pair = input % 4 / 2;
  return input / kBlockColumns * kBlockColumns + 16 * step + 8 * pair + 2 * share + input % 2;
}

// To nearest, ties to even.
__device__ __forceinline__ uint16_t RoundToBfloat16(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// Q1 of a warp's 128 values, two pairs in each lane.
__device__ __forceinline__ uint2 RoundGroup(uint2 pairs) {
  uint32_t largest = MaxMagnitude(pairs.x, pairs.y);
  uint32_t scale =
      InputScale(__reduce_max_sync(0xffffffffu, max(largest & 0xffffu, largest >> 16)));
  return {RoundInput(pairs.x, scale), RoundInput(pairs.y, scale)};
}

// What comes in: routes of tokens, or the sizes of groups of rows that are sorted already.
struct Routing {
  const int32_t* expert_ids;   // [num_tokens, top_k]
  const bool* valid;           // [num_tokens]
  const float* weights;        // [num_tokens, top_k]
  const int32_t* group_sizes;  // [num_experts] and no ids, with top_k 1
  int num_tokens, top_k, num_experts;
};

struct Preparation {
  Routing routing;
  Plan plan;
  const uint16_t* x;  // bfloat16 [num_tokens, width]
  uint16_t* ordered;  // the same rows, as they are multiplied
  uint16_t* unused_rows;  // [num_tokens, outputs]: rows after the last group become 0
  int width, outputs, rows_per_block;
  bool quantize;
  bool reorder;  // for products of warpgroups; else scaled for those of warps
};

constexpr int kPrepareThreads = 1024;  // and as many experts at most

__device__ __forceinline__ int ExpertOfRoute(const Routing& r, int route) {
  int expert = r.expert_ids[route];
  bool known = 0 <= expert && expert < r.num_experts;
  return known && r.valid[route / r.top_k] ? expert : -1;
}

// The sums before each of `values` over a warp's lanes.
__device__ __forceinline__ int SumBefore(int value, int lane) {
  int up_to = value;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    int below = __shfl_up_sync(0xffffffffu, up_to, offset);
    if (lane >= offset) up_to += below;
  }
  return up_to - value;
}

// Blocks of every expert, one thread's, from the numbers of rows; next_row becomes their first
// rows. Returns the number of rows.
__device__ int MakeBlocks(const Preparation& p, const int* sizes, int* next_row) {
  __shared__ int2 of_warp[kPrepareThreads / kWarp];  // rows, blocks
  int expert = threadIdx.x, warp = expert / kWarp, lane = expert % kWarp;
  bool exists = expert < p.routing.num_experts;
  int size = exists ? sizes[expert] : 0;
  int num_blocks = (size + p.rows_per_block - 1) / p.rows_per_block;
  int row = SumBefore(size, lane), block = SumBefore(num_blocks, lane);
  if (lane == kWarp - 1) of_warp[warp] = {row + size, block + num_blocks};
  __syncthreads();
  int2 total = {0, 0};
#pragma unroll
  for (int w = 0; w < kPrepareThreads / kWarp; ++w) {
    if (w == warp) row += total.x, block += total.y;
    total.x += of_warp[w].x;
    total.y += of_warp[w].y;
  }
  if (exists) next_row[expert] = row;
  for (int begin = 0; begin < size; begin += p.rows_per_block) {
    p.plan.blocks[block++] = {expert, row + begin, min(size - begin, p.rows_per_block), 0};
  }
  if (expert == 0) *p.plan.num_blocks = total.y;
  return total.x;
}

__device__ void PlanRows(const Preparation& p) {
  extern __shared__ int shared[];
  const Routing& r = p.routing;
  int *sizes = shared, *next_row = shared + r.num_experts;
  for (int i = threadIdx.x; i < p.plan.num_counters; i += kPrepareThreads) p.plan.counters[i] = 0;
  for (int e = threadIdx.x; e < r.num_experts; e += kPrepareThreads) {
    sizes[e] = r.group_sizes != nullptr ? r.group_sizes[e] : 0;
  }
  __syncthreads();
  int num_routes = r.group_sizes != nullptr ? 0 : r.num_tokens * r.top_k;
  for (int route = threadIdx.x; route < num_routes; route += kPrepareThreads) {
    int expert = ExpertOfRoute(r, route);
    if (expert >= 0) atomicAdd(&sizes[expert], 1);
  }
  __syncthreads();
  int num_rows = MakeBlocks(p, sizes, next_row);
  __syncthreads();
  // Which row of its expert a route gets does not matter: rows do not touch each other's results.
  for (int route = threadIdx.x; route < num_routes; route += kPrepareThreads) {
    int expert = ExpertOfRoute(r, route);
    int row = expert < 0 ? -1 : atomicAdd(&next_row[expert], 1);
    p.plan.row_of_route[route] = row;
    if (row < 0) continue;
    p.plan.source_of_row[row] = route / r.top_k;
    p.plan.weight_of_row[row] = r.weights[route];
  }
  if (p.unused_rows == nullptr) return;
  int64_t begin = int64_t{num_rows} * p.outputs, end = int64_t{r.num_tokens} * p.outputs;
  for (int64_t i = begin + threadIdx.x; i < end; i += kPrepareThreads) {
    p.unused_rows[i] = 0;
  }
}

// A warp for each block of 128 inputs of a row.
__device__ void OrderRows(const Preparation& p) {
  int lane = threadIdx.x % kWarp, groups = p.width / kBlockColumns;
  int64_t num_groups = int64_t{p.routing.num_tokens} * groups;
  int64_t step = int64_t{gridDim.x - 1} * (kPrepareThreads / kWarp);
  int64_t group = (blockIdx.x - 1) * int64_t{kPrepareThreads / kWarp} + threadIdx.x / kWarp;
  for (; group < num_groups; group += step) {
    const uint16_t* from = p.x + group * kBlockColumns;
    uint2 pairs = reinterpret_cast<const uint2*>(from)[lane];
    if (p.quantize) pairs = RoundGroup(pairs);
    if (!p.reorder) pairs = ScaleInputs(pairs);
    uint32_t* to = reinterpret_cast<uint32_t*>(p.ordered + group * kBlockColumns);
    int first = 4 * lane, second = first + 2;
    to[(p.reorder ? OrderedInput(first) : first) / 2] = pairs.x;
    to[(p.reorder ? OrderedInput(second) : second) / 2] = pairs.y;
  }
}

__global__ void __launch_bounds__(kPrepareThreads) Prepare(const __grid_constant__ Preparation p) {
  asm volatile("griddepcontrol.launch_dependents;");
  if (blockIdx.x == 0) {
    PlanRows(p);
  } else {
    OrderRows(p);
  }
}

}  // namespace dsv4
