// The arguments of rms_norm, the same for every platform.
#pragma once

#include "dsv4/cache.h"

namespace dsv4 {

// Operands x [rows, width], weight [width]. Result normalized [rows, width].
struct NormCall {
  const uint16_t* x;
  NormWeight weight;
  uint16_t* normalized;
  int64_t num_rows;
  int32_t width;
  float eps;
};

// Of a row a thread holds so many values.
constexpr int kNormValues = 8, kMaxRowWidth = 1024 * kNormValues;

inline ffi::Error CheckNorm(const ffi::AnyBuffer& x, const ffi::AnyBuffer& weight,
                            const ffi::AnyBuffer& normalized, float eps, NormCall* call) {
  using ffi::DataType;
  DSV4_CHECK(Expect("x", x, DataType::BF16, {kAnySize, kAnySize}));
  const int64_t num_rows = x.dimensions()[0], width = x.dimensions()[1];
  DSV4_CHECK(ExpectMultiple("x: width", width, kNormValues));
  if (width == 0 || width > kMaxRowWidth) {
    return Invalid("x: width", std::to_string(width), "1 to " + std::to_string(kMaxRowWidth));
  }
  DSV4_CHECK(CheckNormWeight("weight", weight, width, &call->weight));
  DSV4_CHECK(Expect("normalized", normalized, DataType::BF16, {num_rows, width}));
  DSV4_CHECK(ExpectAligned("x", x, 16));
  DSV4_CHECK(ExpectAligned("weight", weight, 16));
  DSV4_CHECK(ExpectAligned("normalized", normalized, 16));
  call->x = static_cast<const uint16_t*>(x.untyped_data());
  call->normalized = static_cast<uint16_t*>(normalized.untyped_data());
  call->num_rows = num_rows;
  call->width = static_cast<int32_t>(width);
  call->eps = eps;
  return ffi::Error::Success();
}

}  // namespace dsv4
