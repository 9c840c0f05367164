// Scores of experts, and a warp that chooses the best of them.
#pragma once

#include <climits>
#include <cstdint>

#include "dsv4/router.h"

namespace dsv4 {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// sqrt(softplus(x)), relative error below 1e-6 for |x| < 30 and 4e-6 down to the smallest normal
// results; softplus(x) = max(x, 0) + log1p(exp(-|x|)).
__device__ __forceinline__ float SqrtSoftplus(float x) {
  float u;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(u) : "f"(fabsf(x) * -1.442695041f));
  // log1p(u) / u on [0, 1], relative error 3e-8.
  float p = 0.005232692696f;
  p = fmaf(p, u, -0.02950523235f);
  p = fmaf(p, u, 0.07822594047f);
  p = fmaf(p, u, -0.1366324425f);
  p = fmaf(p, u, 0.1910600662f);
  p = fmaf(p, u, -0.2484298199f);
  p = fmaf(p, u, 0.3331909776f);
  p = fmaf(p, u, -0.4999949336f);
  p = fmaf(p, u, 0.9999999404f);
  // The units that multiply are twice as wide as those that compare: max(x, 0) = (x + |x|) / 2.
  float softplus = fmaf(p, u, 0.5f * (x + fabsf(x))), y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(softplus));
  return y;
}

// Keys compare as integers in the order of the numbers, NaN above them; below are kNoExpert and
// kTaken.
constexpr int kNoExpert = INT_MIN, kTaken = INT_MIN + 1;

__device__ __forceinline__ int OrderedKey(float x) {
  int bits = __float_as_int(x);
  return bits ^ ((bits >> 31) & INT_MAX);
}

// The lane's first expert: a lane has kPerLane consecutive ones, so that the lowest lane among
// equals has the lowest expert.
template <int kPerLane>
__device__ __forceinline__ int FirstExpert() {
  return static_cast<int>(threadIdx.x % kWarp) * kPerLane;
}

// The lane's part of row [num_experts]; kFull where lanes have no more than that.
template <int kPerLane, bool kFull>
__device__ __forceinline__ void LoadLane(const float* row, int num_experts,
                                         float (&values)[kPerLane]) {
  int first = FirstExpert<kPerLane>();
  if constexpr (kFull) {
    static_assert(kPerLane % 4 == 0, "loads are of four");
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      float4 four = *reinterpret_cast<const float4*>(row + first + i);
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      values[i] = first + i < num_experts ? row[first + i] : 0.0f;
    }
  }
}

// The top_k experts of a warp with the largest keys, best first, the lower one first among equals;
// lane r gets the r-th. Where `exhausted`, more than kDepth of a lane's may be among them.
template <int kDepth, int kPerLane>
__device__ __forceinline__ int SelectExperts(const int (&keys)[kPerLane], int top_k,
                                             bool& exhausted) {
  // The best of the lane, in order.
  int best[kDepth], experts[kDepth];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    int key = keys[i], expert = FirstExpert<kPerLane>() + i;
#pragma unroll
    for (int j = 0; j < (i < kDepth ? i : kDepth); ++j) {
      bool stays;
      int lower = min(best[j], key), later = expert;
      best[j] = __vibmax_s32(best[j], key, &stays);
      expert = stays ? later : experts[j];
      experts[j] = stays ? experts[j] : later;
      key = lower;
    }
    if (i < kDepth) best[i] = key, experts[i] = expert;
  }
  int lane = threadIdx.x % kWarp, chosen = 0;
  unsigned lower_lanes = (1u << lane) - 1;
#pragma unroll 1
  for (int rank = 0; rank < top_k; ++rank) {
    bool equal = best[0] == __reduce_max_sync(kAllLanes, best[0]);
    unsigned equals = __ballot_sync(kAllLanes, equal);
    int expert = __shfl_sync(kAllLanes, experts[0], __ffs(equals) - 1);
    if (lane == rank) chosen = expert;
    if (equal && (equals & lower_lanes) == 0) {
#pragma unroll
      for (int j = 0; j + 1 < kDepth; ++j) best[j] = best[j + 1], experts[j] = experts[j + 1];
      best[kDepth - 1] = kTaken;
    }
  }
  exhausted = __any_sync(kAllLanes, best[0] == kTaken);
  return chosen;
}

// Lane r below top_k stores the r-th expert and its score, divided by the sum of theirs, times
// scale.
template <int kTopK>
__device__ __forceinline__ void StoreRoute(int expert, float score, int top_k, float scale,
                                           float* weights, int32_t* ids) {
  int lane = threadIdx.x % kWarp;
  float sum = lane < top_k ? score : 0.0f;
#pragma unroll
  for (int offset = 1; offset < kTopK; offset *= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, offset);
  }
  if (lane < top_k) {
    ids[lane] = expert;
    weights[lane] = score * __fdividef(scale, fmaxf(sum, 1e-20f));
  }
}

// Routes one token by the lanes' scores: selects by score plus bias, weighs by score.
//   shared: [kWarp * kPerLane], the warp's own, 16-byte aligned.
template <int kTopK, int kPerLane>
__device__ __forceinline__ void RouteToken(const float (&scores)[kPerLane],
                                           const float (&biases)[kPerLane], int num_experts,
                                           int top_k, float scale, float* shared, float* weights,
                                           int32_t* ids) {
  int first = FirstExpert<kPerLane>();
  int keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if constexpr (kPerLane % 4 != 0) {
      shared[first + i] = scores[i];
    } else if (i % 4 == 0) {
      float4 four = {scores[i], scores[i + 1], scores[i + 2], scores[i + 3]};
      *reinterpret_cast<float4*>(shared + first + i) = four;
    }
    keys[i] = first + i < num_experts ? OrderedKey(scores[i] + biases[i]) : kNoExpert;
  }
  // A lane seldom has more than a few of the best.
  constexpr int kMost = kTopK < kPerLane ? kTopK : kPerLane, kFew = kMost < 3 ? kMost : 3;
  bool exhausted;
  int expert = SelectExperts<kFew>(keys, top_k, exhausted);
  if (kFew < kMost && exhausted) expert = SelectExperts<kMost>(keys, top_k, exhausted);
  __syncwarp();
  StoreRoute<kTopK>(expert, shared[expert], top_k, scale, weights, ids);
}

}  // namespace dsv4
