// append_swa's work: a warp for each entry, and for each few heads of a token's query.
#pragma once

#include "cache_entry.cuh"
#include "dsv4/cache_append.h"

namespace dsv4 {

// A lane holds 8 channels of each half of a row; the rotary ones are in the upper half of the last
// lanes.
constexpr int kLaneChannels = 8, kHalf = kHeadDim / 2;
constexpr int kFirstRotaryLane = 32 - kRopeDim / kLaneChannels;
constexpr int kLanePairs = kLaneChannels / 2;

// The turns of the lane's rotary channels, each computed once in the warp.
__device__ inline void LaneTurns(const AppendCall& call, int position, Turn (&turns)[kLanePairs]) {
  const int lane = threadIdx.x % 32;
  const Turn own = TurnAt(position, call.frequencies[lane]);
#pragma unroll
  for (int j = 0; j < kLanePairs; ++j) {
    const int source = (kLanePairs * (lane - kFirstRotaryLane) + j) & 31;
    turns[j] = {__shfl_sync(~0u, own.cosine, source), __shfl_sync(~0u, own.sine, source)};
  }
}

__device__ inline float InverseRms(const float (&low)[kLaneChannels],
                                   const float (&high)[kLaneChannels], float eps) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) sum += low[i] * low[i] + high[i] * high[i];
  return rsqrtf(SumOfLanes<32>(sum) * (1.0f / kHeadDim) + eps);
}

template <int kHeads>
__device__ void RotateQueries(const AppendCall& call, int token, int first_head) {
  const int lane = threadIdx.x % 32;
  const int64_t first = (int64_t{token} * call.num_heads + first_head) * kHeadDim;
  const int64_t offset = first / kLaneChannels + lane;
  const uint4* source = reinterpret_cast<const uint4*>(call.q) + offset;
  uint4* target = reinterpret_cast<uint4*>(call.rotated_q) + offset;
  uint4 loaded[kHeads][2];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (first_head + i >= call.num_heads) continue;
    loaded[i][0] = source[64 * i];
    loaded[i][1] = source[64 * i + 32];
  }
  Turn turns[kLanePairs];
  LaneTurns(call, call.start[token / call.num_tokens] + token % call.num_tokens, turns);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (first_head + i >= call.num_heads) break;
    float low[kLaneChannels], high[kLaneChannels];
    UnpackBfloat16(loaded[i][0], low);
    UnpackBfloat16(loaded[i][1], high);
    const float scale = InverseRms(low, high, call.eps);
#pragma unroll
    for (int j = 0; j < kLaneChannels; ++j) low[j] *= scale, high[j] *= scale;
    StoreBfloat16(reinterpret_cast<uint8_t*>(target + 64 * i), low);
    if (lane >= kFirstRotaryLane) {
      RoundToBfloat16(high);
      Rotate(high, turns);
    }
    StoreBfloat16(reinterpret_cast<uint8_t*>(target + 64 * i + 32), high);
  }
}

// Copies entry `row` of the layer's ring.
template <EntryFormat kFormat>
__device__ void KeepEntry(const AppendCall& call, int64_t row) {
  const int lane = threadIdx.x % 32;
  constexpr int64_t kBody = BodyBytes(kFormat, kHeadDim), kScales = ScaleBytes(kFormat, kHeadDim);
  const int64_t ring_row = call.first_row + row;
  const uint4* source = reinterpret_cast<const uint4*>(call.ring.body + ring_row * kBody);
  uint4* target = reinterpret_cast<uint4*>(call.before.body + row * kBody);
  for (int i = lane; i < kBody / 16; i += 32) target[i] = source[i];
  if (lane < kScales / 4) {
    reinterpret_cast<uint32_t*>(call.before.scales + row * kScales)[lane] =
        reinterpret_cast<const uint32_t*>(call.ring.scales + ring_row * kScales)[lane];
  }
}

template <EntryFormat kFormat>
__device__ void WriteEntry(const AppendCall& call, int row) {
  const int lane = threadIdx.x % 32, channel = kLaneChannels * lane;
  const int sequence = row / call.num_tokens, token = row % call.num_tokens;
  const uint4* source = reinterpret_cast<const uint4*>(call.kv + int64_t{row} * kHeadDim) + lane;
  const uint4 loaded[2] = {source[0], source[32]};
  float weight_low[kLaneChannels], weight_high[kLaneChannels];
  LoadWeight(call.weight, channel, weight_low);
  LoadWeight(call.weight, kHalf + channel, weight_high);
  Turn turns[kLanePairs];
  LaneTurns(call, call.start[sequence] + token, turns);

  float low[kLaneChannels], high[kLaneChannels];
  UnpackBfloat16(loaded[0], low);
  UnpackBfloat16(loaded[1], high);
  const float scale = InverseRms(low, high, call.eps);
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    low[i] = RoundToBfloat16(low[i] * scale * weight_low[i]);
    high[i] = RoundToBfloat16(high[i] * scale * weight_high[i]);
  }
  uint32_t amax = 0;
  if (kFormat == EntryFormat::kFloatScale) {
    amax = AmaxBits(low);
    if (lane < kFirstRotaryLane) amax = max(amax, AmaxBits(high));
    amax = MaxOfLanes<32>(amax);
  }
  if (lane >= kFirstRotaryLane) Rotate(high, turns);

  auto store = [&](const EntryPlanes& planes, int64_t target) {
    StoreEntry<kFormat, kHeadDim>(planes, target, channel, low, amax);
    StoreEntry<kFormat, kHeadDim>(planes, target, kHalf + channel, high, amax);
  };
  const int64_t target = RingRow(call, sequence, token);
  if (call.with_chunk) {
    if (target >= 0) {
      KeepEntry<kFormat>(call, target - call.first_row);
      __syncwarp();  // Other lanes overwrite what this one reads.
    }
    store(call.chunk, row);
  }
  store(call.ring, target);
}

// The rest of what `before` keeps of the ring: entries that the chunk does not overwrite.
template <EntryFormat kFormat>
__device__ void KeepOther(const AppendCall& call, int index) {
  const int sequence = index / call.ring_size, slot = index % call.ring_size;
  const int first = call.start[sequence] % call.ring_size;
  const int token = (slot - first + call.ring_size) % call.ring_size;
  if (token < call.length[sequence]) return;
  KeepEntry<kFormat>(call, index);
}

// What a warp does of a call: an entry to write, one to keep, or `kHeads` heads of a query.
template <EntryFormat kFormat, int kHeads>
__device__ void AppendTask(const AppendCall& call, int task) {
  const int num_rows = call.batch * call.num_tokens;
  if (task < num_rows) return WriteEntry<kFormat>(call, task);
  task -= num_rows;
  if (call.with_chunk) {
    const int num_kept = call.batch * call.ring_size;
    if (task < num_kept) return KeepOther<kFormat>(call, task);
    task -= num_kept;
  }
  const int per_token = (call.num_heads + kHeads - 1) / kHeads;
  if (task >= num_rows * per_token) return;
  RotateQueries<kHeads>(call, task / per_token, task % per_token * kHeads);
}

// How many tasks a call has.
inline int64_t NumAppendTasks(const AppendCall& call, int heads_of_task) {
  const int64_t rows = int64_t{call.batch} * call.num_tokens;
  const int64_t kept = call.with_chunk ? int64_t{call.batch} * call.ring_size : 0;
  return rows * (1 + (call.num_heads + heads_of_task - 1) / heads_of_task) + kept;
}

}  // namespace dsv4
