// The arguments of nvfp4_quantize, the same for every platform.
#pragma once

#include "dsv4/ffi.h"
#include "dsv4/nvfp4.h"

namespace dsv4 {

// Floats that blocks exchange the largest magnitude through.
constexpr int64_t kNvfp4QuantizeWorkspace = 4096;

// So that offsets, padding included, are 32-bit numbers.
constexpr int64_t kNvfp4MaxGroups = int64_t{1} << 30;

inline ffi::Error CheckNvfp4Quantize(const ffi::AnyBuffer& x, const ffi::AnyBuffer& packed,
                                     const ffi::AnyBuffer& scales,
                                     const ffi::AnyBuffer& global_scale,
                                     const ffi::AnyBuffer& workspace) {
  DSV4_CHECK(ExpectDtype("x", x, {ffi::DataType::BF16, ffi::DataType::F32}));
  DSV4_CHECK(ExpectShape("x", x, {kAnySize, kAnySize}));
  const int64_t num_rows = x.dimensions()[0], width = x.dimensions()[1];
  DSV4_CHECK(ExpectMultiple("x: width", width, kNvfp4Group));
  if (num_rows * (width / kNvfp4Group) > kNvfp4MaxGroups) {
    return Invalid("x", "shape " + ShapeText(x.dimensions()), "fewer than 2^34 elements");
  }
  DSV4_CHECK(Expect("packed", packed, ffi::DataType::U8, {num_rows, width / 2}));
  DSV4_CHECK(Expect("scales", scales, ffi::DataType::F8E4M3FN,
                    {(num_rows + kScaleBlockRows - 1) / kScaleBlockRows,
                     (width / kNvfp4Group + kScaleBlockGroups - 1) / kScaleBlockGroups,
                     kScaleBlockBytes}));
  DSV4_CHECK(Expect("workspace", workspace, ffi::DataType::F32, {kNvfp4QuantizeWorkspace}));
  DSV4_CHECK(ExpectDtype("global_scale", global_scale, {ffi::DataType::F32}));
  if (global_scale.dimensions().size() == 0) return ffi::Error::Success();
  return ExpectShape("global_scale", global_scale, {num_rows});
}

}  // namespace dsv4
