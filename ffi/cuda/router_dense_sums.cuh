// Sums that the blocks of a dense router leave for those that select. A stored word is never zero;
// who has read it stores zero for the next launch.
#pragma once

#include <cstdint>

#include "router.cuh"

namespace dsv4 {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;

// Zero between launches. Launches of few and of many tokens have a ring each, of which they take
// turns with pieces, so that those that run at the same time, which are few, have different ones;
// small, so that pieces may still be in L2.
constexpr uint32_t kFewWords = 1 << 19, kManyWords = 1 << 21;
static __device__ uint4 arena[(kFewWords + kManyWords) / 4];

struct Problem {
  const uint16_t* x;  // [num_tokens, width] bfloat16
  const float* bias;
  int num_tokens, width, num_experts, top_k;
  float scale;
  int slice, num_slices;  // columns
  int lanes_of_quad;      // threads that add up four experts
  uint32_t first_sum;     // in the arena: [num_tokens, num_slices, padded experts]
  float* weights;
  int32_t* ids;

  __host__ __device__ int NumQuads() const { return (num_experts + 3) / 4; }
};

// Complements: that of zero is not zero.
constexpr uint32_t kZero = 0xffffffffu;
__device__ __forceinline__ uint32_t Encode(float sum) { return max(~__float_as_uint(sum), 1u); }
__device__ __forceinline__ float Decode(uint32_t word) { return __uint_as_float(~word); }

__device__ __forceinline__ void Publish(uint32_t* to, uint32_t word) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}
__device__ __forceinline__ void Publish(uint32_t* to, uint32_t word, uint32_t next) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(word), "r"(next)
               : "memory");
}

__device__ __forceinline__ uint4 Look(const uint32_t* from) {
  uint4 words;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from)
               : "memory");
  return words;
}

// The selecting warp works with the others through these barriers; the last is of the others alone.
enum Barrier { kScored = 1, kSelected = 2, kWorkers = 3 };

template <Barrier kBarrier>
__device__ __forceinline__ void Sync() {
  constexpr int kCount = kBarrier == kWorkers ? kThreads : kThreads + kWarp;
  asm volatile("bar.sync %0, %1;" ::"n"(static_cast<int>(kBarrier)), "n"(kCount) : "memory");
}

// The token's sums of the thread's four experts, over all slices.
template <int kPolled>
__device__ __forceinline__ float4 Collect(const Problem& p, uint32_t* sums, int padded_experts) {
  int quad = threadIdx.x / p.lanes_of_quad, first = threadIdx.x % p.lanes_of_quad;
  float4 sum = {0, 0, 0, 0};
  if (quad < p.NumQuads()) {
    uint32_t* from = sums + first * padded_experts + quad * 4;
    int step = p.lanes_of_quad * padded_experts;
    uint4 words[kPolled];
    bool missing;
    do {
      missing = false;
#pragma unroll
      for (int i = 0; i < kPolled; ++i) {
        words[i] = {kZero, kZero, kZero, kZero};
        if (first + i * p.lanes_of_quad < p.num_slices) words[i] = Look(from + i * step);
      }
#pragma unroll
      for (int i = 0; i < kPolled; ++i) {
        missing |= min(min(words[i].x, words[i].y), min(words[i].z, words[i].w)) == 0;
      }
    } while (missing);
#pragma unroll
    for (int i = 0; i < kPolled; ++i) {
      if (first + i * p.lanes_of_quad < p.num_slices) {
        *reinterpret_cast<uint4*>(from + i * step) = {0, 0, 0, 0};
      }
      sum.x += Decode(words[i].x), sum.y += Decode(words[i].y);
      sum.z += Decode(words[i].z), sum.w += Decode(words[i].w);
    }
  }
  for (int offset = 1; offset < p.lanes_of_quad; offset *= 2) {
    sum.x += __shfl_xor_sync(kAllLanes, sum.x, offset);
    sum.y += __shfl_xor_sync(kAllLanes, sum.y, offset);
    sum.z += __shfl_xor_sync(kAllLanes, sum.z, offset);
    sum.w += __shfl_xor_sync(kAllLanes, sum.w, offset);
  }
  return sum;
}

}  // namespace dsv4
