// What the handlers of hyper-connections require of their arguments, on every platform.
#pragma once

#include <cstdint>

#include "dsv4/ffi.h"

namespace dsv4 {

constexpr int kNumStreams = 4;
// Of the projection: weights that collapse the streams, that spread an output, and that mix them.
constexpr int kGateRows = kNumStreams * (kNumStreams + 2);

// streams [N, 4, D] and output [N, D] bfloat16, post [N, 4] and comb [N, 4, 4] float32.
inline ffi::Error ExpectSpread(const ffi::AnyBuffer& output, const ffi::AnyBuffer& streams,
                               const ffi::AnyBuffer& post, const ffi::AnyBuffer& comb) {
  using ffi::DataType;
  DSV4_CHECK(Expect("streams", streams, DataType::BF16, {kAnySize, kNumStreams, kAnySize}));
  const int64_t num_tokens = streams.dimensions()[0], width = streams.dimensions()[2];
  DSV4_CHECK(ExpectMultiple("width", width, 8));
  DSV4_CHECK(Expect("output", output, DataType::BF16, {num_tokens, width}));
  DSV4_CHECK(Expect("post", post, DataType::F32, {num_tokens, kNumStreams}));
  return Expect("comb", comb, DataType::F32, {num_tokens, kNumStreams, kNumStreams});
}

// fn [24, 4 D], base [24], scale [3] and norm_weight [D] float32.
inline ffi::Error ExpectGates(const ffi::AnyBuffer& streams, const ffi::AnyBuffer& fn,
                              const ffi::AnyBuffer& base, const ffi::AnyBuffer& scale,
                              const ffi::AnyBuffer& norm_weight) {
  using ffi::DataType;
  DSV4_CHECK(Expect("streams", streams, DataType::BF16, {kAnySize, kNumStreams, kAnySize}));
  const int64_t width = streams.dimensions()[2];
  DSV4_CHECK(Expect("fn", fn, DataType::F32, {kGateRows, kNumStreams * width}));
  DSV4_CHECK(Expect("base", base, DataType::F32, {kGateRows}));
  DSV4_CHECK(Expect("scale", scale, DataType::F32, {3}));
  return Expect("norm_weight", norm_weight, DataType::F32, {width});
}

}  // namespace dsv4
