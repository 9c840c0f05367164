// The arguments of sparse_attention.
#pragma once

#include <cstdint>

#include "dsv4/attention_problem.h"
#include "dsv4/ffi.h"

namespace dsv4 {

struct AttentionArguments {
  ffi::AnyBuffer q, sink, frequencies, ring, ring_scales, recent, recent_scales, pool, pool_scales;
  ffi::AnyBuffer block_table, ids, start, length;
  int64_t layer, pool_layer, window, ratio;
  float scale;
};

inline ffi::Error CheckLayer(const char* name, int64_t layer, int64_t num_layers) {
  if (layer >= 0 && layer < num_layers) return ffi::Error::Success();
  return Invalid(name, std::to_string(layer), "0 to " + std::to_string(num_layers - 1));
}

// q [b, t, h, c], sink [h], frequencies [r / 2], ring [l, s, n, c + r], recent [b, t or 0, c + r],
// pool [l, n, e, c + r], all with [..., 8] scales, block_table [b, m], ids [b, t, k], start [b],
// length [b], o [b, t, h, c].
inline ffi::Error CheckAttention(const AttentionArguments& x, const ffi::AnyBuffer& o,
                                 Attention* attention) {
  using ffi::DataType;
  DSV4_CHECK(ExpectShape("q", x.q, {kAnySize, kAnySize, kAnySize, kAnySize}));
  DSV4_CHECK(ExpectDtype("q", x.q, {DataType::BF16, DataType::F32}));
  const int64_t b = x.q.dimensions()[0], t = x.q.dimensions()[1];
  const int64_t h = x.q.dimensions()[2], c = x.q.dimensions()[3];
  DSV4_CHECK(Expect("o", o, x.q.element_type(), {b, t, h, c}));
  DSV4_CHECK(Expect("sink", x.sink, DataType::F32, {h}));
  DSV4_CHECK(Expect("frequencies", x.frequencies, DataType::F32, {kAnySize}));
  const int64_t rotary = 2 * x.frequencies.dimensions()[0], body = c + rotary;
  if (rotary > c || (c - rotary) % kGroupChannels != 0 ||
      (c - rotary) / kGroupChannels > kScaleBytes) {
    return Invalid("frequencies", std::to_string(rotary / 2) + " pairs of " + std::to_string(c) +
                                      " channels", "a multiple of 64 channels, at most 512, left");
  }
  DSV4_CHECK(Expect("ring", x.ring, DataType::U8, {kAnySize, kAnySize, kAnySize, body}));
  const int64_t layers = x.ring.dimensions()[0], slots = x.ring.dimensions()[1];
  const int64_t ring_size = x.ring.dimensions()[2];
  DSV4_CHECK(
      Expect("ring_scales", x.ring_scales, DataType::U8, {layers, slots, ring_size, kScaleBytes}));
  if (slots < b) {
    return Invalid("ring", std::to_string(slots) + " slots", "one for each sequence");
  }
  DSV4_CHECK(Expect("recent", x.recent, DataType::U8, {b, kAnySize, body}));
  const int64_t recent = x.recent.dimensions()[1];
  if (recent != 0) DSV4_CHECK(ExpectShape("recent", x.recent, {b, t, body}));
  DSV4_CHECK(Expect("recent_scales", x.recent_scales, DataType::U8, {b, recent, kScaleBytes}));
  DSV4_CHECK(Expect("pool", x.pool, DataType::U8, {kAnySize, kAnySize, kAnySize, body}));
  const int64_t pools = x.pool.dimensions()[0], blocks = x.pool.dimensions()[1];
  const int64_t per_block = x.pool.dimensions()[2];
  DSV4_CHECK(
      Expect("pool_scales", x.pool_scales, DataType::U8, {pools, blocks, per_block, kScaleBytes}));
  DSV4_CHECK(Expect("block_table", x.block_table, DataType::S32, {b, kAnySize}));
  DSV4_CHECK(Expect("ids", x.ids, DataType::S32, {b, t, kAnySize}));
  DSV4_CHECK(Expect("start", x.start, DataType::S32, {b}));
  DSV4_CHECK(Expect("length", x.length, DataType::S32, {b}));
  DSV4_CHECK(CheckLayer("layer", x.layer, layers));
  DSV4_CHECK(CheckLayer("pool_layer", x.pool_layer, pools));
  const int64_t needed = recent != 0 ? x.window - 1 : x.window + t - 1;
  if (x.window < 1 || ring_size < needed) {
    return Invalid("ring", std::to_string(ring_size) + " tokens",
                   std::to_string(needed) + " or more");
  }
  if (b * t > INT32_MAX) return Invalid("q", ShapeText(x.q.dimensions()), "below 2^31 queries");
  const int64_t table_width = blocks == 0 ? 0 : x.block_table.dimensions()[1];
  if (table_width * per_block > INT32_MAX - x.window) {
    return Invalid("block_table", ShapeText(x.block_table.dimensions()), "fewer than 2^31 entries");
  }
  auto records = [](const ffi::AnyBuffer& bodies, const ffi::AnyBuffer& scales, int64_t first) {
    const auto* body_bytes = static_cast<const uint8_t*>(bodies.untyped_data());
    const auto* scale_bytes = static_cast<const uint8_t*>(scales.untyped_data());
    return Records{body_bytes + first * bodies.dimensions().back(),
                   scale_bytes + first * kScaleBytes};
  };
  Attention& a = *attention;
  a.q = x.q.untyped_data();
  a.sink = x.sink.typed_data<float>();
  a.frequencies = x.frequencies.typed_data<float>();
  a.ring = records(x.ring, x.ring_scales, x.layer * slots * ring_size);
  a.recent = records(x.recent, x.recent_scales, 0);
  a.pool = records(x.pool, x.pool_scales, x.pool_layer * blocks * per_block);
  a.block_table = x.block_table.typed_data<int32_t>();
  a.ids = x.ids.typed_data<int32_t>();
  a.start = x.start.typed_data<int32_t>();
  a.length = x.length.typed_data<int32_t>();
  a.scale = x.scale;
  a.num_queries = static_cast<int>(b * t);
  a.tokens = static_cast<int>(t);
  a.heads = static_cast<int>(h);
  a.width = static_cast<int>(c);
  a.rotary_width = static_cast<int>(rotary);
  a.window = static_cast<int>(x.window);
  a.ring_size = static_cast<int>(ring_size);
  a.has_recent = recent != 0;
  a.num_ids = static_cast<int>(x.ids.dimensions()[2]);
  a.ratio = static_cast<int>(blocks == 0 ? 0 : x.ratio);
  a.per_block = static_cast<int>(per_block);
  a.table_width = static_cast<int>(table_width);
  return ffi::Error::Success();
}

}  // namespace dsv4
