// indexer_queries' work: head after head.
#pragma once

#include "cache_entry.h"
#include "dsv4/indexer_queries.h"

namespace dsv4 {

inline void PrepareHead(const QueriesCall& call, int64_t head) {
  float x[kKeyDim];
  for (int i = 0; i < kKeyDim; ++i) x[i] = FromBfloat16(call.q[head * kKeyDim + i]);
  Rotate(x, kKeyDim, call.positions[head / call.num_heads], call.frequencies);
  Hadamard(x, kKeyDim);
  for (int first = 0; first < kKeyDim; first += kKeyGroup) {
    const float amax = AtLeast(kKeyFloor, Amax(x + first, kKeyGroup));
    const uint32_t scale = ScaleE8m0(amax, 1.0f / kLargestE2m1);
    for (int i = first; i < first + kKeyGroup; ++i) x[i] = RoundKey(x[i], scale);
  }
  const int exponent = QueryExponent(Amax(x, kKeyDim));
  for (int i = 0; i < kKeyDim; ++i) {
    call.codes[head * kKeyDim + i] = EncodeE4m3(x[i] * PowerOfTwo(-exponent));
  }
  call.scaled_weights[head] = call.weights[head] * call.scale * PowerOfTwo(exponent);
}

inline void PrepareQueries(const QueriesCall& call) {
  for (int64_t head = 0; head < call.num_rows * call.num_heads; ++head) PrepareHead(call, head);
}

}  // namespace dsv4
