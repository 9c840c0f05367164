// Hyper-connections: what the kernels of hc_post and hc_pre share.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "dsv4/hyper_connections.h"

namespace dsv4 {
namespace hyper {

constexpr int kWarp = 32;
constexpr int kLaneChannels = 8;  // 16 bytes
// What a warp mixes of 8 tokens at a time, and how many such steps' sums are added up first.
constexpr int kStepChannels = 4 * kLaneChannels, kStepsPerSum = 8;
// Of a token: projections, the sum of squares, and what fills up 16 bytes.
constexpr int kSums = kGateRows + 4;

struct Problem {
  const uint16_t* output;   // [num_tokens, width] bfloat16
  const uint16_t* streams;  // [num_tokens, 4, width] bfloat16
  const float* post;        // [num_tokens, 4]
  const float* comb;        // [num_tokens, 4 (from), 4 (to)]
  const float* fn;          // [24, 4 width]
  const float* base;
  const float* scale;
  const float* norm_weight;
  int num_tokens, width, num_parts, num_iterations;
  float eps, norm_eps;
  uint16_t* new_streams;
  float* sums;  // [num_parts, num_tokens, kSums]
  uint16_t* x;  // [num_tokens, width] bfloat16
  float* new_post;
  float* new_comb;
};

__device__ __forceinline__ float2 Unpack(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

__device__ __forceinline__ uint32_t Pack(float2 x) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(x.x, x.y);
  return *reinterpret_cast<uint32_t*>(&pair);
}

__device__ __forceinline__ float Element(const float4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

// How one token's output and streams become its new streams.
struct Mixing {
  float4 post, comb[kNumStreams];

  // Of tokens' pieces, post and the rows of comb.
  __device__ __forceinline__ void Load(const float4 (&pieces)[kNumStreams + 1][8], int token) {
    post = pieces[0][token];
#pragma unroll
    for (int j = 0; j < kNumStreams; ++j) comb[j] = pieces[1 + j][token];
  }

  // Eight channels: streams[k] = post_k output + sum_j comb[j, k] streams[j].
  __device__ __forceinline__ void Apply(uint4 output, uint4 (&streams)[kNumStreams]) const {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      float2 x[kNumStreams], o = Unpack((&output.x)[pair]);
#pragma unroll
      for (int j = 0; j < kNumStreams; ++j) x[j] = Unpack((&streams[j].x)[pair]);
#pragma unroll
      for (int k = 0; k < kNumStreams; ++k) {
        float2 y = {0.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < kNumStreams; ++j) {
          y.x = fmaf(Element(comb[j], k), x[j].x, y.x);
          y.y = fmaf(Element(comb[j], k), x[j].y, y.y);
        }
        y.x = fmaf(Element(post, k), o.x, y.x);
        y.y = fmaf(Element(post, k), o.y, y.y);
        (&streams[k].x)[pair] = Pack(y);
      }
    }
  }
};

}  // namespace hyper
}  // namespace dsv4
