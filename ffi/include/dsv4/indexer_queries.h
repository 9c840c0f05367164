// The arguments of indexer_queries, the same for every platform.
#pragma once

#include "dsv4/cache.h"

namespace dsv4 {

// Operands q [b, t, h, 128], weights [b, t, h], positions [b, t], frequencies [32]. Results codes
// [b, t, h, 128], of queries whose power of two is in scaled_weights [b, t, h].
struct QueriesCall {
  const uint16_t* q;
  const float* weights;
  const int32_t* positions;
  const float* frequencies;
  uint8_t* codes;
  float* scaled_weights;
  int64_t num_rows;
  int32_t num_heads;
  float scale;
};

// A head's largest channel is brought within [2^7, 2^8): E4M3 ends at 448.
constexpr int kTopExponent = 7;

// The exponent of the power of two that a head's weight takes over.
DSV4_HOST_DEVICE int QueryExponent(float amax) {
  const int exponent = static_cast<int>(BitCast<uint32_t>(amax) >> 23) - 127;
  return (exponent < -100 ? -100 : exponent > 127 ? 127 : exponent) - kTopExponent;
}

DSV4_HOST_DEVICE float PowerOfTwo(int exponent) {
  return BitCast<float>(static_cast<uint32_t>(exponent + 127) << 23);
}

// The value of x as a channel of a key with this scale byte would have it.
DSV4_HOST_DEVICE float RoundKey(float x, uint32_t scale) {
  return DecodeE2m1(KeyCode(x, scale)) * DecodeE8m0(scale);
}

inline ffi::Error CheckQueries(const ffi::AnyBuffer& q, const ffi::AnyBuffer& weights,
                               const ffi::AnyBuffer& positions, const ffi::AnyBuffer& frequencies,
                               const ffi::AnyBuffer& codes, const ffi::AnyBuffer& scaled_weights,
                               float scale, QueriesCall* call) {
  using ffi::DataType;
  DSV4_CHECK(Expect("q", q, DataType::BF16, {kAnySize, kAnySize, kAnySize, kKeyDim}));
  const int64_t b = q.dimensions()[0], t = q.dimensions()[1], h = q.dimensions()[2];
  DSV4_CHECK(Expect("weights", weights, DataType::F32, {b, t, h}));
  DSV4_CHECK(Expect("positions", positions, DataType::S32, {b, t}));
  DSV4_CHECK(Expect("frequencies", frequencies, DataType::F32, {kRopePairs}));
  DSV4_CHECK(Expect("codes", codes, DataType::F8E4M3FN, {b, t, h, kKeyDim}));
  DSV4_CHECK(Expect("scaled weights", scaled_weights, DataType::F32, {b, t, h}));
  DSV4_CHECK(ExpectAligned("q", q, 8));
  *call = {static_cast<const uint16_t*>(q.untyped_data()),
           weights.typed_data<float>(),
           positions.typed_data<int32_t>(),
           frequencies.typed_data<float>(),
           static_cast<uint8_t*>(codes.untyped_data()),
           scaled_weights.typed_data<float>(),
           b * t,
           static_cast<int32_t>(h),
           scale};
  return ffi::Error::Success();
}

}  // namespace dsv4
