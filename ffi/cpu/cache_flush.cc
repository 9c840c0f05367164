// flush_csa and flush_hca: one sequence after the other.

#include <cmath>
#include <limits>

#include "cache_entry.h"
#include "dsv4/cache_flush.h"

namespace dsv4 {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

struct Row {
  float value, score;
};

Row ChunkRow(const FlushCall& call, const FlushStream& stream, int channels, int sequence,
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

void StoreEntry(const FlushCall& call, const FlushStream& stream, int width, int sequence, int id,
                float* pooled) {
  const int64_t row = PoolRow(call, stream, sequence, id);
  if (row < 0) return;
  std::transform(pooled, pooled + width, pooled, RoundToBfloat16);
  NormalizeAndRotate(pooled, width, stream.weight, call.eps, id * call.ratio, call.frequencies);
  if (width == kKeyDim) Hadamard(pooled, width);
  EncodeEntry(pooled, width, stream.pool, row);
}

void FlushOverlapping(const FlushCall& call, const FlushStream& stream, int width, int sequence) {
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

void FlushRunning(const FlushCall& call, const FlushStream& stream, int width, int sequence) {
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

ffi::Error FlushCsa(ffi::AnyBuffer block_table, ffi::AnyBuffer start, ffi::AnyBuffer length,
                    ffi::AnyBuffer frequencies, ffi::RemainingArgs operands,
                    ffi::RemainingRets results, int64_t layer, float eps) {
  FlushCall call;
  DSV4_CHECK(CheckFlush(block_table, start, length, frequencies, operands, results, layer, eps,
                        {kHeadDim, kKeyDim}, true, &call));
  for (int sequence = 0; sequence < call.batch; ++sequence) {
    FlushOverlapping(call, call.streams[0], kHeadDim, sequence);
    FlushOverlapping(call, call.streams[1], kKeyDim, sequence);
  }
  return ffi::Error::Success();
}

ffi::Error FlushHca(ffi::AnyBuffer block_table, ffi::AnyBuffer start, ffi::AnyBuffer length,
                    ffi::AnyBuffer frequencies, ffi::RemainingArgs operands,
                    ffi::RemainingRets results, int64_t layer, float eps) {
  FlushCall call;
  DSV4_CHECK(CheckFlush(block_table, start, length, frequencies, operands, results, layer, eps,
                        {kHeadDim}, false, &call));
  for (int sequence = 0; sequence < call.batch; ++sequence) {
    FlushRunning(call, call.streams[0], kHeadDim, sequence);
  }
  return ffi::Error::Success();
}

}  // namespace

#define DSV4_FLUSH_BINDING               \
  ffi::Ffi::Bind()                       \
      .Arg<ffi::AnyBuffer>()             \
      .Arg<ffi::AnyBuffer>()             \
      .Arg<ffi::AnyBuffer>()             \
      .Arg<ffi::AnyBuffer>()             \
      .RemainingArgs()                   \
      .RemainingRets()                   \
      .Attr<int64_t>("layer")            \
      .Attr<float>("eps")

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_flush_csa, FlushCsa, DSV4_FLUSH_BINDING,
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_flush_hca, FlushHca, DSV4_FLUSH_BINDING,
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
