// Scores of experts, and a warp that chooses the best of them.
#pragma once

#include <climits>
#include <cstdint>

#include "dsv4/router.h"

namespace dsv4 {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
__device__ __forceinline__ float Infinity() { return __int_as_float(0x7f800000); }

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
  float softplus = fmaf(p, u, fmaxf(x, 0.0f)), y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(softplus));
  return y;
}

// What the selection compares; NaN counts as +inf. There is no -0: scores are not negative.
__device__ __forceinline__ float Biased(float score, float bias) {
  return fminf(score + bias, Infinity());
}

// Compare as integers in the order of the numbers.
__device__ __forceinline__ int OrderedKey(float x) {
  int bits = __float_as_int(x);
  return bits ^ ((bits >> 31) & INT_MAX);
}
__device__ __forceinline__ float NumberOfKey(int key) {
  return __int_as_float(key ^ ((key >> 31) & INT_MAX));
}
constexpr int kTaken = INT_MIN;  // below all numbers

// The lane's first expert: a lane has kPerLane consecutive ones, so that the lowest lane among
// equals has the lowest expert.
template <int kPerLane>
__device__ __forceinline__ int FirstExpert() {
  return static_cast<int>(threadIdx.x % kWarp) * kPerLane;
}

// The lane's part of row [num_experts], with `absent` behind its end; kFull where lanes have no
// more than that.
template <int kPerLane, bool kFull>
__device__ __forceinline__ void LoadLane(const float* row, int num_experts, float absent,
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
      values[i] = first + i < num_experts ? row[first + i] : absent;
    }
  }
}

template <int kPerLane>
__device__ __forceinline__ void StoreLane(float* row, const float (&values)[kPerLane]) {
  int first = FirstExpert<kPerLane>();
  if constexpr (kPerLane % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      *reinterpret_cast<float4*>(row + first + i) = {values[i], values[i + 1], values[i + 2],
                                                     values[i + 3]};
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) row[first + i] = values[i];
  }
}

// SelectExperts where equal numbers may be among the chosen, and a lane may have all of them.
template <int kPerLane>
__device__ __forceinline__ int SelectAmongEquals(const float (&numbers)[kPerLane], int top_k) {
  int lane = threadIdx.x % kWarp, chosen = 0;
  int keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) keys[i] = OrderedKey(numbers[i]);
#pragma unroll 1
  for (int rank = 0; rank < top_k; ++rank) {
    int best = keys[0], at = 0;
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) {
      if (keys[i] > best) best = keys[i], at = i;
    }
    int equals = __ballot_sync(kAllLanes, best == __reduce_max_sync(kAllLanes, best));
    int winner = __ffs(equals) - 1;
    int expert = __shfl_sync(kAllLanes, FirstExpert<kPerLane>() + at, winner);
    if (lane == rank) chosen = expert;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (lane == winner && i == at) keys[i] = kTaken;
    }
  }
  return chosen;
}

// The top_k experts of a warp with the largest numbers, best first, the lower one first among
// equals; lane r gets the r-th.
//   row: the lanes' numbers, in shared memory.
template <int kTopK, int kPerLane>
__device__ __forceinline__ int SelectExperts(const float (&numbers)[kPerLane], const float* row,
                                             int top_k) {
  // A lane seldom has more than a few of the chosen.
  constexpr int kFew = kTopK <= 6 ? 3 : kTopK <= 8 ? 4 : 5;
  constexpr int kDepth = kPerLane < kFew ? kPerLane : kFew;
  float largest[kDepth];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    float number = numbers[i];
#pragma unroll
    for (int j = 0; j < (i < kDepth ? i : kDepth); ++j) {
      float lower = fminf(largest[j], number);
      largest[j] = fmaxf(largest[j], number);
      number = lower;
    }
    if (i < kDepth) largest[i] = number;
  }
  int best[kDepth];
#pragma unroll
  for (int j = 0; j < kDepth; ++j) best[j] = OrderedKey(largest[j]);

  int lane = threadIdx.x % kWarp, key = 0, lowest = 0;
  unsigned winners = 1;
#pragma unroll 1
  for (int rank = 0; rank < top_k; ++rank) {
    lowest = __reduce_max_sync(kAllLanes, best[0]);
    bool wins = best[0] == lowest;
    unsigned equals = __ballot_sync(kAllLanes, wins);
    if (lane == rank) winners = equals, key = lowest;
#pragma unroll
    for (int j = 0; j < kDepth; ++j) {
      if (wins) best[j] = j + 1 < kDepth ? best[j + 1] : kTaken;
    }
  }
  int first = (__ffs(winners) - 1) * kPerLane, expert = 0;
  float number = NumberOfKey(key);
#pragma unroll
  for (int i = kPerLane - 1; i >= 0; --i) {
    if (row[first + i] == number) expert = first + i;
  }
  // Equals of several lanes or of one.
  bool unclear = (winners & (winners - 1)) != 0;
  unclear |= __shfl_up_sync(kAllLanes, key, 1) == key && lane > 0 && lane < top_k;
  if (kDepth < kPerLane && __any_sync(kAllLanes, best[0] == kTaken)) {
    int eligible = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) eligible += numbers[i] >= NumberOfKey(lowest);
    unclear |= eligible > kDepth;
  }
  if (__any_sync(kAllLanes, unclear)) expert = SelectAmongEquals(numbers, top_k);
  return expert;
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
    float reciprocal;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(fmaxf(sum, 1e-20f)));
    weights[lane] = score * (scale * reciprocal);
  }
}

// A token's experts in shared memory, 16-byte aligned.
template <int kPerLane>
struct TokenExperts {
  float scores[kWarp * kPerLane];
  float numbers[kWarp * kPerLane];  // biased scores
};

// Routes one token by a warp: selects by the lanes' numbers, weighs by score. Numbers of experts
// that there are not are -inf.
template <int kTopK, int kPerLane>
__device__ __forceinline__ void RouteToken(const float (&numbers)[kPerLane],
                                           const TokenExperts<kPerLane>& experts, int top_k,
                                           float scale, float* weights, int32_t* ids) {
  int expert = SelectExperts<kTopK>(numbers, experts.numbers, top_k);
  StoreRoute<kTopK>(expert, experts.scores[expert], top_k, scale, weights, ids);
}

// Routes one token by a warp, from its logits; the lane's part of them and of the bias, -inf where
// there is no expert.
template <int kTopK, int kPerLane>
__device__ __forceinline__ void RouteLogits(const float (&logits)[kPerLane],
                                            const float (&biases)[kPerLane],
                                            TokenExperts<kPerLane>& experts, int top_k, float scale,
                                            float* weights, int32_t* ids) {
  float scores[kPerLane], numbers[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    scores[i] = SqrtSoftplus(logits[i]);
    numbers[i] = Biased(scores[i], biases[i]);
  }
  StoreLane(experts.scores, scores);
  StoreLane(experts.numbers, numbers);
  __syncwarp();
  RouteToken<kTopK>(numbers, experts, top_k, scale, weights, ids);
}

}  // namespace dsv4
