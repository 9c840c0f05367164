// Hyper-connections: gates from what the projection summed, collapse of the streams and norm.
#pragma once

#include "hyper_connections.cuh"

namespace dsv4 {
namespace hyper {

constexpr int kCollapseWarps = 8, kCollapseThreads = (kCollapseWarps + 1) * kWarp;
constexpr int kChunkChannels = kWarp * kLaneChannels;  // of a warp at a time
static_assert(kChunkChannels == kStepsPerSum * kStepChannels, "as many sums as chunks");
constexpr int kMatrix = kNumStreams * kNumStreams;

__device__ __forceinline__ float Reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float Sigmoid(float x) { return Reciprocal(1.0f + expf(-x)); }

__device__ __forceinline__ float SumOfWarp(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// Softmax of each row, then columns and rows in turn divided by their sums plus eps. What rows and
// columns have been divided by is multiplied in at the end: with r and c the factors so far,
// c_k (sum_j r_j x_jk + eps / c_k) = 1.
struct Divisors {
  float values[kNumStreams] = {1.0f, 1.0f, 1.0f, 1.0f};
  float factors[kNumStreams] = {1.0f, 1.0f, 1.0f, 1.0f};

  __device__ __forceinline__ void Update(int i, const float (&x)[kNumStreams],
                                         const Divisors& other, float eps) {
    const float(&f)[kNumStreams] = other.factors;
    values[i] = fmaf(x[1], f[1], fmaf(x[0], f[0], eps * values[i])) + fmaf(x[3], f[3], x[2] * f[2]);
    factors[i] = Reciprocal(values[i]);
  }
};

__device__ __forceinline__ void Sinkhorn(float (&mix)[kNumStreams][kNumStreams],
                                         int num_iterations, float eps) {
#pragma unroll
  for (float(&row)[kNumStreams] : mix) {
    float largest = fmaxf(fmaxf(row[0], row[1]), fmaxf(row[2], row[3]));
#pragma unroll
    for (float& x : row) x = expf(x - largest);
    float inverse = Reciprocal((row[0] + row[1]) + (row[2] + row[3]));
#pragma unroll
    for (float& x : row) x = fmaf(x, inverse, eps);
  }
  Divisors rows, columns;
#pragma unroll 1
  for (int i = 0;; ++i) {
#pragma unroll
    for (int k = 0; k < kNumStreams; ++k) {
      columns.Update(k, {mix[0][k], mix[1][k], mix[2][k], mix[3][k]}, rows, eps);
    }
    if (i + 1 >= num_iterations) break;
#pragma unroll
    for (int j = 0; j < kNumStreams; ++j) rows.Update(j, mix[j], columns, eps);
  }
#pragma unroll
  for (int j = 0; j < kNumStreams; ++j) {
#pragma unroll
    for (int k = 0; k < kNumStreams; ++k) mix[j][k] *= rows.factors[j] * columns.factors[k];
  }
}

__device__ __forceinline__ void MakeMixing(const Problem& p, int token, const float* logits) {
  float mix[kNumStreams][kNumStreams];
#pragma unroll
  for (int i = 0; i < kMatrix; ++i) mix[i / kNumStreams][i % kNumStreams] = logits[i];
  Sinkhorn(mix, p.num_iterations, p.eps);
  float4* to = reinterpret_cast<float4*>(p.new_comb) + int64_t{token} * kNumStreams;
#pragma unroll
  for (int j = 0; j < kNumStreams; ++j) to[j] = {mix[j][0], mix[j][1], mix[j][2], mix[j][3]};
}

// Eight channels of four streams become one.
__device__ __forceinline__ uint4 CollapseChannels(const float (&pre)[kNumStreams],
                                                  const uint4 (&streams)[kNumStreams]) {
  uint4 collapsed;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    float2 y = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < kNumStreams; ++j) {
      float2 x = Unpack((&streams[j].x)[pair]);
      y.x = fmaf(pre[j], x.x, y.x);
      y.y = fmaf(pre[j], x.y, y.y);
    }
    (&collapsed.x)[pair] = Pack(y);
  }
  return collapsed;
}

__device__ __forceinline__ float SumOfSquares(const uint4& x) {
  float2 sum = {0.0f, 0.0f};
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    float2 y = Unpack((&x.x)[pair]);
    sum.x = fmaf(y.x, y.x, sum.x);
    sum.y = fmaf(y.y, y.y, sum.y);
  }
  return sum.x + sum.y;
}

// Barriers of the warps that collapse, and from the first of these to the one that mixes.
__device__ __forceinline__ void SyncCollapseWarps() {
  asm volatile("bar.sync 2, %0;" ::"n"(kCollapseWarps * kWarp) : "memory");
}
__device__ __forceinline__ void AnnounceLogits() {
  asm volatile("bar.arrive 1, %0;" ::"n"(2 * kWarp) : "memory");
}
__device__ __forceinline__ void AwaitLogits() {
  asm volatile("bar.sync 1, %0;" ::"n"(2 * kWarp) : "memory");
}

// Eight channels, normed.
__device__ __forceinline__ uint4 Norm(uint4 y, float scale, const float4 (&weights)[2]) {
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    float2 x = Unpack((&y.x)[pair]);
    const float4& w = weights[pair / 2];
    (&y.x)[pair] = pair % 2 ? Pack({x.x * scale * w.z, x.y * scale * w.w})
                            : Pack({x.x * scale * w.x, x.y * scale * w.y});
  }
  return y;
}

// Bytes of the collapsed stream, and of two floats for each lane and chunk.
inline int CollapseBytes(int width) { return width / kLaneChannels * (16 + 2 * sizeof(float)); }

// The sum over the first index of what lies in shared memory, in that order.
__device__ __forceinline__ float SumOfChunks(const float* of_chunks, int num_chunks) {
  float sum = 0.0f;
#pragma unroll 8
  for (int i = 0; i < num_chunks; ++i) sum += of_chunks[i * kWarp];
  return sum;
}

// A block for each token; those written last come first. Eight warps have chunks of the channels in
// turn, a ninth makes the mixing matrix. Sums come in kParts parts for each chunk: of many tokens,
// these have been added up before, in the same order.
template <int kParts>
__global__ void __launch_bounds__(kCollapseThreads, kParts == 1 ? 3 : 2)
    Collapse(const __grid_constant__ Problem p) {
  constexpr int kAheadChunks = 2;
  extern __shared__ uint4 memory[];
  __shared__ float logits[kMatrix];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int num_chunks = p.width / kChunkChannels;
  const int64_t token = p.num_tokens - 1 - blockIdx.x;
  if (warp == kCollapseWarps) {
    AwaitLogits();
    if (lane == 0) MakeMixing(p, token, logits);
    return;
  }
  uint4* collapsed = memory + lane;
  float* sums_of_chunks = reinterpret_cast<float*>(memory + num_chunks * kWarp) + lane;
  float* squares_of_chunks = sums_of_chunks + num_chunks * kWarp;
  // What the kernel before does not write comes first.
  const int row = min(lane, kGateRows - 1);
  const float gate_scale = __ldg(p.scale + min(row / kNumStreams, 2)), base = __ldg(p.base + row);
  float4 weights[kAheadChunks][2];
  auto load_weights = [&](int first) {
#pragma unroll
    for (int i = 0; i < kAheadChunks; ++i) {
      int chunk = first + i * kCollapseWarps;
      const float4* source =
          reinterpret_cast<const float4*>(p.norm_weight) + 2 * (chunk * kWarp + lane);
      if (chunk < num_chunks) weights[i][0] = __ldg(source), weights[i][1] = __ldg(source + 1);
    }
  };
  // Of many tokens, other blocks have left them near, and the registers are needed.
  constexpr bool kEarlyWeights = kParts > 1;
  if (kEarlyWeights) load_weights(warp);
  asm volatile("griddepcontrol.wait;" ::: "memory");

  float parts[kAheadChunks][kParts];
  auto load_parts = [&](int first) {
    const float* sums = p.sums + token * kSums + min(lane, kSums - 1);
#pragma unroll
    for (int i = 0; i < kAheadChunks * kParts; ++i) {
      int chunk = first + i / kParts * kCollapseWarps, part = chunk * kParts + i % kParts;
      if (chunk < num_chunks) {
        parts[i / kParts][i % kParts] = sums[part * int64_t{p.num_tokens} * kSums];
      }
    }
  };
  uint4 streams[kAheadChunks][kNumStreams];
  auto load_streams = [&](int chunk, uint4(&to)[kNumStreams]) {
    const uint4* source = reinterpret_cast<const uint4*>(p.streams) +
                          (token * kNumStreams * num_chunks + chunk) * kWarp + lane;
    if (chunk >= num_chunks) return;
#pragma unroll
    for (int j = 0; j < kNumStreams; ++j) to[j] = __ldcs(source + j * num_chunks * kWarp);
  };
  load_parts(warp);
#pragma unroll
  for (int i = 0; i < kAheadChunks; ++i) load_streams(warp + i * kCollapseWarps, streams[i]);
  for (int first = warp;;) {
#pragma unroll
    for (int i = 0; i < kAheadChunks; ++i) {
      int chunk = first + i * kCollapseWarps;
      float sum = 0.0f;
#pragma unroll
      for (float part : parts[i]) sum += part;
      if (chunk < num_chunks) sums_of_chunks[chunk * kWarp] = sum;
    }
    first += kAheadChunks * kCollapseWarps;
    if (first >= num_chunks) break;
    load_parts(first);
  }
  SyncCollapseWarps();
  const float total = SumOfChunks(sums_of_chunks, num_chunks);
  const float inverse_width = Reciprocal(p.width);
  const float mean_square = __shfl_sync(~0u, total, kGateRows) * (inverse_width / kNumStreams);
  const float logit = fmaf(total * rsqrtf(mean_square + p.norm_eps), gate_scale, base);
  if (warp == 0) {
    if (lane >= 2 * kNumStreams && lane < kGateRows) logits[lane - 2 * kNumStreams] = logit;
    AnnounceLogits();
  }
  const float gate = Sigmoid(logit);
  if (warp == 0 && lane / kNumStreams == 1) {
    p.new_post[token * kNumStreams + lane % kNumStreams] = 2.0f * gate;
  }
  float pre[kNumStreams];
#pragma unroll
  for (int j = 0; j < kNumStreams; ++j) pre[j] = __shfl_sync(~0u, gate, j) + p.eps;

  for (int first = warp; first < num_chunks; first += kAheadChunks * kCollapseWarps) {
#pragma unroll
    for (int i = 0; i < kAheadChunks; ++i) {
      int chunk = first + i * kCollapseWarps;
      if (chunk >= num_chunks) break;
      uint4 y = CollapseChannels(pre, streams[i]);
      load_streams(chunk + kAheadChunks * kCollapseWarps, streams[i]);
      collapsed[chunk * kWarp] = y;
      squares_of_chunks[chunk * kWarp] = SumOfSquares(y);
    }
  }
  SyncCollapseWarps();
  const float squares = SumOfWarp(SumOfChunks(squares_of_chunks, num_chunks));
  const float scale = rsqrtf(fmaf(squares, inverse_width, p.norm_eps));
  for (int first = warp; first < num_chunks; first += kAheadChunks * kCollapseWarps) {
    if (!kEarlyWeights || first > warp) load_weights(first);
#pragma unroll
    for (int i = 0; i < kAheadChunks; ++i) {
      int chunk = first + i * kCollapseWarps;
      if (chunk >= num_chunks) break;
      reinterpret_cast<uint4*>(p.x)[(token * num_chunks + chunk) * kWarp + lane] =
          Norm(collapsed[chunk * kWarp], scale, weights[i]);
    }
  }
}

}  // namespace hyper
}  // namespace dsv4
