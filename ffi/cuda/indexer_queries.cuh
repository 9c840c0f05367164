// indexer_queries' work: a warp for each head of a query.
#pragma once

#include "cache_entry.cuh"
#include "dsv4/indexer_queries.h"

namespace dsv4 {

// Of a lane.
constexpr int kQueryChannels = kKeyDim / 32, kQueryPairs = kQueryChannels / 2;
constexpr int kFirstRotaryQueryLane = (kKeyDim - kRopeDim) / kQueryChannels;

// x H / sqrt(128) of a warp's channels, H[i][j] = (-1)^popcount(i & j).
__device__ inline void Hadamard(float (&x)[kQueryChannels]) {
  const float sums[kQueryPairs] = {x[0] + x[1], x[2] + x[3]};
  const float differences[kQueryPairs] = {x[0] - x[1], x[2] - x[3]};
  x[0] = sums[0] + sums[1], x[2] = sums[0] - sums[1];
  x[1] = differences[0] + differences[1], x[3] = differences[0] - differences[1];
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) {
#pragma unroll
    for (float& value : x) {
      const float other = __shfl_xor_sync(~0u, value, mask);
      value = threadIdx.x & mask ? other - value : other + value;
    }
  }
#pragma unroll
  for (float& value : x) value *= 0.08838834764831845f;
}

__device__ inline void PrepareHead(const QueriesCall& call, int64_t head) {
  if (head >= call.num_rows * call.num_heads) return;
  const int lane = threadIdx.x % 32;
  const int64_t offset = head * kKeyDim + kQueryChannels * lane;
  const uint2 loaded = *reinterpret_cast<const uint2*>(call.q + offset);
  float x[kQueryChannels] = {
      __uint_as_float(loaded.x << 16), __uint_as_float(loaded.x & 0xffff0000u),
      __uint_as_float(loaded.y << 16), __uint_as_float(loaded.y & 0xffff0000u)};
  if (lane >= kFirstRotaryQueryLane) {
    const int position = call.positions[head / call.num_heads];
    const float* frequencies = call.frequencies + kQueryPairs * (lane - kFirstRotaryQueryLane);
    Turn turns[kQueryPairs];
#pragma unroll
    for (int j = 0; j < kQueryPairs; ++j) turns[j] = TurnAt(position, frequencies[j]);
    Rotate(x, turns);
    RoundToBfloat16(x);
  }
  Hadamard(x);
  RoundToBfloat16(x);
  const uint32_t group = MaxOfLanes<kKeyGroup / kQueryChannels>(AmaxBits(x));
  const uint32_t scale = ScaleE8m0(AtLeast(kKeyFloor, group), 1.0f / kLargestE2m1);
#pragma unroll
  for (float& value : x) value = RoundKey(value, scale);
  const int exponent = QueryExponent(__uint_as_float(MaxOfLanes<32>(AmaxBits(x))));
  StoreE4m3(call.codes + offset, x, PowerOfTwo(-exponent));
  if (lane == 0) {
    call.scaled_weights[head] = call.weights[head] * call.scale * PowerOfTwo(exponent);
  }
}

}  // namespace dsv4
