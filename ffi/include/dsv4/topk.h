// The arguments of topk_select.
#pragma once

#include <cstdint>

#include "dsv4/ffi.h"

namespace dsv4 {

constexpr int64_t kMaxTopkSelectK = 2048;

// scores [..., n], lengths [...] or empty for "all of n", values and indices [..., k].
inline ffi::Error CheckTopkSelect(const ffi::AnyBuffer& scores, const ffi::AnyBuffer& lengths,
                                  const ffi::AnyBuffer& values, const ffi::AnyBuffer& indices) {
  DSV4_CHECK(ExpectDtype("scores", scores, {ffi::DataType::F32}));
  DSV4_CHECK(ExpectDtype("lengths", lengths, {ffi::DataType::S32}));
  DSV4_CHECK(ExpectDtype("values", values, {ffi::DataType::F32}));
  DSV4_CHECK(ExpectDtype("indices", indices, {ffi::DataType::S32}));
  if (scores.dimensions().size() == 0) return Invalid("scores", "a scalar", "rows");
  const int64_t n = scores.dimensions().back();
  const int64_t k = values.dimensions().size() ? values.dimensions().back() : 0;
  if (k < 1 || k > n || k > kMaxTopkSelectK) {
    return Invalid("k", std::to_string(k),
                   "1 to " + std::to_string(n < kMaxTopkSelectK ? n : kMaxTopkSelectK));
  }
  const int64_t num_rows = static_cast<int64_t>(scores.element_count()) / n;
  const int64_t num_lengths = static_cast<int64_t>(lengths.element_count());
  if (num_lengths != 0 && num_lengths != num_rows) {
    return Invalid("lengths", std::to_string(num_lengths),
                   std::to_string(num_rows) + ", one for each row");
  }
  for (const ffi::AnyBuffer* result : {&values, &indices}) {
    if (static_cast<int64_t>(result->element_count()) != num_rows * k) {
      return Invalid("results", ShapeText(result->dimensions()),
                     std::to_string(num_rows) + " rows of " + std::to_string(k));
    }
  }
  return ffi::Error::Success();
}

}  // namespace dsv4
