// The arguments of append_swa.
#pragma once

#include <vector>

#include "dsv4/cache.h"

namespace dsv4 {

// Operands q [b, t, h, c], kv [b, t, c], weight [c], start [b], length [b], frequencies [r / 2],
// then the ring's planes [l, s, ring, .]. Results q, the planes, and perhaps as many of
// [b, ring, .], the slots as they were, and of [b, t, .], the chunk's entries.
struct AppendCall {
  const uint16_t* q;
  const uint16_t* kv;
  NormWeight weight;
  const int32_t* start;
  const int32_t* length;
  const float* frequencies;
  uint16_t* rotated_q;
  EntryPlanes ring, before, chunk;  // The last two only if `with_chunk`.
  bool with_chunk;
  int32_t batch, num_tokens, num_heads, ring_size;
  int64_t first_row;  // of the layer in the ring's planes.
  float eps;
};

inline ffi::Error CheckAppend(ffi::AnyBuffer q, ffi::AnyBuffer kv, ffi::AnyBuffer weight,
                              ffi::AnyBuffer start, ffi::AnyBuffer length,
                              ffi::AnyBuffer frequencies, size_t num_planes,
                              ffi::AnyBuffer rotated_q, const std::vector<ffi::AnyBuffer>& results,
                              int64_t layer, float eps, AppendCall* call) {
  using ffi::DataType;
  DSV4_CHECK(Expect("q", q, DataType::BF16, {kAnySize, kAnySize, kAnySize, kHeadDim}));
  const int64_t b = q.dimensions()[0], t = q.dimensions()[1], h = q.dimensions()[2];
  DSV4_CHECK(Expect("kv", kv, DataType::BF16, {b, t, kHeadDim}));
  DSV4_CHECK(CheckNormWeight("weight", weight, kHeadDim, &call->weight));
  DSV4_CHECK(Expect("start", start, DataType::S32, {b}));
  DSV4_CHECK(Expect("length", length, DataType::S32, {b}));
  DSV4_CHECK(Expect("frequencies", frequencies, DataType::F32, {kRopePairs}));
  DSV4_CHECK(Expect("rotated q", rotated_q, DataType::BF16, {b, t, h, kHeadDim}));
  call->with_chunk = results.size() == 3 * num_planes;
  if (results.size() != num_planes && !call->with_chunk) {
    return Invalid("results", std::to_string(results.size()) + " planes",
                   std::to_string(num_planes) + ", once or three times");
  }
  auto range = [&](size_t first) {
    const auto begin = results.begin() + first;
    return std::vector<ffi::AnyBuffer>(begin, begin + num_planes);
  };
  const std::vector<ffi::AnyBuffer> ring = range(0);
  DSV4_CHECK(CheckPlanes("window", ring, {kAnySize, kAnySize, kAnySize}, kHeadDim, &call->ring));
  const int64_t layers = ring[0].dimensions()[0], slots = ring[0].dimensions()[1];
  const int64_t ring_size = ring[0].dimensions()[2];
  DSV4_CHECK(CheckLayer(layer, layers));
  if (b > slots || ring_size == 0) {
    return Invalid("window", ShapeText(ring[0].dimensions()),
                   std::to_string(b) + " slots or more, and a ring");
  }
  if (call->with_chunk) {
    DSV4_CHECK(CheckPlanes("before", range(num_planes), {b, ring_size}, kHeadDim, &call->before));
    DSV4_CHECK(CheckPlanes("new", range(2 * num_planes), {b, t}, kHeadDim, &call->chunk));
  }
  for (const auto& [name, buffer] : {std::pair{"q", q}, {"kv", kv}, {"rotated q", rotated_q}}) {
    DSV4_CHECK(ExpectAligned(name, buffer, 16));
  }
  DSV4_CHECK(ExpectAligned("weight", weight, 16));
  call->q = static_cast<const uint16_t*>(q.untyped_data());
  call->kv = static_cast<const uint16_t*>(kv.untyped_data());
  call->start = start.typed_data<int32_t>();
  call->length = length.typed_data<int32_t>();
  call->frequencies = frequencies.typed_data<float>();
  call->rotated_q = static_cast<uint16_t*>(rotated_q.untyped_data());
  call->batch = static_cast<int32_t>(b);
  call->num_tokens = static_cast<int32_t>(t);
  call->num_heads = static_cast<int32_t>(h);
  call->ring_size = static_cast<int32_t>(ring_size);
  call->first_row = layer * slots * ring_size;
  call->eps = eps;
  return ffi::Error::Success();
}

// The ring's row for a token of a sequence; -1 if it is not kept.
DSV4_HOST_DEVICE int64_t RingRow(const AppendCall& call, int sequence, int token) {
  const int length = call.length[sequence];
  if (token >= length || token < length - call.ring_size) return -1;
  const int slot = (call.start[sequence] + token) % call.ring_size;
  return call.first_row + int64_t{sequence} * call.ring_size + slot;
}

}  // namespace dsv4
