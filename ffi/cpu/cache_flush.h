// flush_csa's and flush_hca's work: one sequence after the other.
#pragma once

#include <cmath>
#include <limits>

#include "cache_entry.h"
#include "dsv4/cache_flush.h"

namespace dsv4 {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

struct Row {
  float value, score;
};

inline Row ChunkRow(const FlushCall& call, const FlushStream& stream, int channels, int sequence,
                    int token, int channel) {
  const int64_t i = (int64_t{sequence} * call.num_tokens + token) * channels + channel;
  const int place = (call.start[sequence] + token) % call.ratio;
  return {stream.value[i], stream.gate[i] + stream.ape[int64_t{place} * channels + channel]};
}

// max, sum and weighted sum of a softmax.
struct Running {
  float peak = kNothing, sum = 0.0f, weighted = 0.0f;

  void Add(Row row) {
    const float higher = std::max(peak, row.score);
    if (higher == kNothing) return;
    const float kept = std::exp(peak - higher), weight = std::exp(row.score - higher);
    sum = sum * kept + weight;
    weighted = weighted * kept + weight * row.value;
    peak = higher;
  }
  float Mean() const { return weighted / (sum > 0.0f ? sum : 1.0f); }
};

inline void StoreEntry(const FlushCall& call, const FlushStream& stream, int width, int sequence,
                       int id, float* pooled) {
  const int64_t row = PoolRow(call, stream, sequence, id);
  if (row < 0) return;
  std::transform(pooled, pooled + width, pooled, RoundToBfloat16);
  NormalizeAndRotate(pooled, width, stream.weight, call.eps, id * call.ratio, call.frequencies);
  if (width == kKeyDim) Hadamard(pooled, width);
  EncodeEntry(pooled, width, stream.pool, row);
}

inline void FlushOverlapping(const FlushCall& call, const FlushStream& stream, int width,
                             int sequence) {
  const int channels = 2 * width;
  const int start = call.start[sequence], length = call.length[sequence];
  float* tail = stream.tail + (call.layer * call.num_slots + sequence) * kOverlapRows * kRowParts *
                                  int64_t{channels};
  auto slot = [&](int position) { return tail + position % kOverlapRows * kRowParts * channels; };
  auto row_at = [&](int position, int channel) -> Row {
    if (position < 0) return {0.0f, kNothing};
    if (position >= start) {
      return ChunkRow(call, stream, channels, sequence, position - start, channel);
    }
    return {slot(position)[channel], slot(position)[channels + channel]};
  };
  for (int id = start / kOverlapRatio; id < (start + length) / kOverlapRatio; ++id) {
    float pooled[kHeadDim];
    for (int channel = 0; channel < width; ++channel) {
      Running running;
      for (int i = 0; i < kOverlapRows; ++i) {
        const int half = i < kOverlapRatio ? 0 : width;
        running.Add(row_at((id - 1) * kOverlapRatio + i, half + channel));
      }
      pooled[channel] = running.Mean();
    }
    StoreEntry(call, stream, width, sequence, id, pooled);
  }
  for (int token = std::max(0, length - kOverlapRows); token < length; ++token) {
    float* target = slot(start + token);
    for (int channel = 0; channel < channels; ++channel) {
      const Row row = ChunkRow(call, stream, channels, sequence, token, channel);
      target[channel] = row.value;
      target[channels + channel] = row.score;
    }
  }
}

inline void FlushRunning(const FlushCall& call, const FlushStream& stream, int width,
                         int sequence) {
  const int start = call.start[sequence], end = start + call.length[sequence];
  float* tail = stream.tail +
                (call.layer * call.num_slots + sequence) * kRunningParts * int64_t{width};
  for (int id = start / call.ratio; id * call.ratio < end; ++id) {
    const int last = std::min(end, (id + 1) * call.ratio);
    float pooled[kHeadDim];
    for (int channel = 0; channel < width; ++channel) {
      Running running;
      if (id * call.ratio < start) {
        running = {tail[channel], tail[width + channel], tail[2 * width + channel]};
      }
      for (int position = std::max(start, id * call.ratio); position < last; ++position) {
        running.Add(ChunkRow(call, stream, width, sequence, position - start, channel));
      }
      pooled[channel] = running.Mean();
      if (last < end) continue;
      tail[channel] = running.peak;
      tail[width + channel] = running.sum;
      tail[2 * width + channel] = running.weighted;
    }
    if (last == (id + 1) * call.ratio) StoreEntry(call, stream, width, sequence, id, pooled);
  }
}

inline void FlushCsa(const FlushCall& call) {
  for (int sequence = 0; sequence < call.batch; ++sequence) {
    FlushOverlapping(call, call.streams[0], kHeadDim, sequence);
    FlushOverlapping(call, call.streams[1], kKeyDim, sequence);
  }
}

inline void FlushHca(const FlushCall& call) {
  for (int sequence = 0; sequence < call.batch; ++sequence) {
    FlushRunning(call, call.streams[0], kHeadDim, sequence);
  }
}

}  // namespace dsv4
