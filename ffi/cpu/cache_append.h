// append_swa's work: one token after the other.
#pragma once

#include "cache_entry.h"
#include "dsv4/cache_append.h"

namespace dsv4 {

inline void RotateQuery(const AppendCall& call, int64_t head, int position) {
  float x[kHeadDim];
  std::transform(call.q + head * kHeadDim, call.q + (head + 1) * kHeadDim, x, FromBfloat16);
  const float scale = InverseRms(x, kHeadDim, call.eps);
  for (float& value : x) value = RoundToBfloat16(value * scale);
  Rotate(x, kHeadDim, position, call.frequencies);
  std::transform(x, x + kHeadDim, call.rotated_q + head * kHeadDim, ToBfloat16);
}

inline void KeepRing(const AppendCall& call) {
  const int64_t count = int64_t{call.batch} * call.ring_size;
  const int64_t body = BodyBytes(call.ring.format, kHeadDim);
  const int64_t scales = ScaleBytes(call.ring.format, kHeadDim);
  std::copy_n(call.ring.body + call.first_row * body, count * body, call.before.body);
  std::copy_n(call.ring.scales + call.first_row * scales, count * scales, call.before.scales);
}

inline void Append(const AppendCall& call) {
  if (call.with_chunk) KeepRing(call);
  for (int sequence = 0; sequence < call.batch; ++sequence) {
    for (int token = 0; token < call.num_tokens; ++token) {
      const int64_t row = int64_t{sequence} * call.num_tokens + token;
      const int position = call.start[sequence] + token;
      for (int64_t head = 0; head < call.num_heads; ++head) {
        RotateQuery(call, row * call.num_heads + head, position);
      }
      float x[kHeadDim];
      std::transform(call.kv + row * kHeadDim, call.kv + (row + 1) * kHeadDim, x, FromBfloat16);
      NormalizeAndRotate(x, kHeadDim, call.weight, call.eps, position, call.frequencies);
      if (call.with_chunk) EncodeEntry(x, kHeadDim, call.chunk, row);
      const int64_t target = RingRow(call, sequence, token);
      if (target >= 0) EncodeEntry(x, kHeadDim, call.ring, target);
    }
  }
}

}  // namespace dsv4
