// The arguments of flush_csa and flush_hca.
#pragma once

#include <algorithm>
#include <vector>

#include "dsv4/cache.h"

namespace dsv4 {

constexpr int kOverlapRatio = 4, kOverlapRows = 2 * kOverlapRatio, kRunningRatio = 128;
// Value and score; max, sum and weighted sum.
constexpr int kRowParts = 2, kRunningParts = 3;

struct FlushStream {
  const float* value;
  const float* gate;
  const float* ape;
  NormWeight weight;
  float* tail;
  EntryPlanes pool;
  int32_t num_blocks, per_block;
};

// Operands block_table [b, m], start [b], length [b], frequencies [r / 2], then of each stream
// value [b, t, channels], gate, ape [ratio, channels], weight [w], tail and planes [l, n, e, .].
// Results: of each stream tail and planes. Tails are [l, s, 8, 2, 2 w] or [l, s, 3, w].
struct FlushCall {
  const int32_t* block_table;
  const int32_t* start;
  const int32_t* length;
  const float* frequencies;
  FlushStream streams[2];
  int32_t batch, num_tokens, table_width, num_slots, ratio;
  int64_t layer;
  float eps;

  // How many entries a sequence's chunk completes at most.
  DSV4_HOST_DEVICE int max_entries() const { return (num_tokens + ratio - 1) / ratio; }
};

inline ffi::Error CheckFlush(ffi::AnyBuffer block_table, ffi::AnyBuffer start,
                             ffi::AnyBuffer length, ffi::AnyBuffer frequencies,
                             const std::vector<ffi::AnyBuffer>& operands,
                             const std::vector<ffi::AnyBuffer>& results, int64_t layer, float eps,
                             std::vector<int> widths, bool overlapping, FlushCall* call) {
  using ffi::DataType;
  DSV4_CHECK(Expect("block_table", block_table, DataType::S32, {kAnySize, kAnySize}));
  const int64_t b = block_table.dimensions()[0];
  DSV4_CHECK(Expect("start", start, DataType::S32, {b}));
  DSV4_CHECK(Expect("length", length, DataType::S32, {b}));
  DSV4_CHECK(Expect("frequencies", frequencies, DataType::F32, {kRopePairs}));
  const size_t num_states = results.size() / widths.size();
  if (num_states < 2 || results.size() != num_states * widths.size() ||
      operands.size() != results.size() + 4 * widths.size()) {
    return Invalid("operands", std::to_string(operands.size()),
                   "4 arrays, a tail and 1 or 2 planes for each stream");
  }
  *call = {};
  call->ratio = overlapping ? kOverlapRatio : kRunningRatio;
  for (size_t i = 0; i < widths.size(); ++i) {
    FlushStream& stream = call->streams[i];
    const int64_t width = widths[i], channels = overlapping ? 2 * width : width;
    auto operand = [&](size_t j) { return operands[i * (4 + num_states) + j]; };
    auto state = [&](size_t j) { return results[i * num_states + j]; };
    const ffi::AnyBuffer value = operand(0), gate = operand(1), ape = operand(2), tail = state(0);
    DSV4_CHECK(Expect("value", value, DataType::F32, {b, kAnySize, channels}));
    const int64_t t = value.dimensions()[1];
    DSV4_CHECK(Expect("gate", gate, DataType::F32, {b, t, channels}));
    DSV4_CHECK(Expect("ape", ape, DataType::F32, {call->ratio, channels}));
    if (i > 0 && t != call->num_tokens) {
      return Invalid("value", std::to_string(t) + " tokens", std::to_string(call->num_tokens));
    }
    DSV4_CHECK(CheckNormWeight("weight", operand(3), width, &stream.weight));
    DSV4_CHECK(overlapping
                   ? Expect("tail", tail, DataType::F32,
                            {kAnySize, kAnySize, kOverlapRows, kRowParts, channels})
                   : Expect("tail", tail, DataType::F32,
                            {kAnySize, kAnySize, kRunningParts, channels}));
    DSV4_CHECK(CheckLayer(layer, tail.dimensions()[0]));
    const int64_t slots = tail.dimensions()[1];
    if (b > slots || (i > 0 && slots != call->num_slots)) {
      return Invalid("tail", ShapeText(tail.dimensions()),
                     std::to_string(b) + " slots or more, the same for all streams");
    }
    std::vector<ffi::AnyBuffer> planes;
    for (size_t j = 1; j < num_states; ++j) planes.push_back(state(j));
    DSV4_CHECK(CheckPlanes("pool", planes, {tail.dimensions()[0], kAnySize, kAnySize},
                           widths[i], &stream.pool));
    for (const ffi::AnyBuffer& buffer : {value, gate, ape, operand(3), tail}) {
      DSV4_CHECK(ExpectAligned("stream", buffer, 16));
    }
    stream.value = value.typed_data<float>();
    stream.gate = gate.typed_data<float>();
    stream.ape = ape.typed_data<float>();
    stream.tail = tail.typed_data<float>();
    stream.num_blocks = static_cast<int32_t>(planes[0].dimensions()[1]);
    stream.per_block = static_cast<int32_t>(planes[0].dimensions()[2]);
    call->num_tokens = static_cast<int32_t>(t);
    call->num_slots = static_cast<int32_t>(slots);
  }
  call->block_table = block_table.typed_data<int32_t>();
  call->start = start.typed_data<int32_t>();
  call->length = length.typed_data<int32_t>();
  call->frequencies = frequencies.typed_data<float>();
  call->batch = static_cast<int32_t>(b);
  call->table_width = static_cast<int32_t>(block_table.dimensions()[1]);
  call->layer = layer;
  call->eps = eps;
  return ffi::Error::Success();
}

// A sequence's entry in a stream's planes; -1 if it has no block.
DSV4_HOST_DEVICE int64_t PoolRow(const FlushCall& call, const FlushStream& stream, int sequence,
                                 int id) {
  return EntryRow(call.block_table + int64_t{sequence} * call.table_width, call.table_width,
                  call.layer, stream.num_blocks, stream.per_block, id);
}

}  // namespace dsv4
