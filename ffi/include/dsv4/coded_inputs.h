// Rows of input as E4M3 codes in tiles (dsv4_jax/formats/coded_inputs.py), and the arguments of the
// calls that make and take them, the same for every platform.
#pragma once

#include "dsv4/gemm.h"

namespace dsv4 {

constexpr int kInputTileRows = 8;

// A row's weights are held in registers, eight for each thread of a block.
constexpr int64_t kMaxNormWidth = 8192;

inline ffi::Error CheckCodedInputs(const ffi::AnyBuffer& codes, const ffi::AnyBuffer& scales,
                                   int64_t num_rows, int64_t blocks) {
  const int64_t row_tiles = CeilDiv(num_rows, kInputTileRows);
  DSV4_CHECK(Expect("input codes", codes, ffi::DataType::U8,
                    {blocks, row_tiles, kInputTileRows, kBlockColumns}));
  DSV4_CHECK(ExpectAligned("input codes", codes, 16));
  DSV4_CHECK(Expect("input scales", scales, ffi::DataType::F32,
                    {blocks, row_tiles * kInputTileRows}));
  return ExpectAligned("input scales", scales, 16);
}

inline ffi::Error CheckNormQuantize(const ffi::AnyBuffer& x, const ffi::AnyBuffer& weight,
                                    const ffi::AnyBuffer& normalized, const ffi::AnyBuffer& codes,
                                    const ffi::AnyBuffer& scales) {
  DSV4_CHECK(Expect("x", x, ffi::DataType::BF16, {kAnySize, kAnySize}));
  DSV4_CHECK(ExpectAligned("x", x, 16));
  const int64_t num_rows = x.dimensions()[0], width = x.dimensions()[1];
  DSV4_CHECK(ExpectMultiple("x: width", width, kBlockColumns));
  if (width > kMaxNormWidth) {
    return Invalid("x: width", std::to_string(width), "at most " + std::to_string(kMaxNormWidth));
  }
  DSV4_CHECK(Expect("weight", weight, ffi::DataType::F32, {width}));
  DSV4_CHECK(ExpectAligned("weight", weight, 16));
  DSV4_CHECK(Expect("normalized", normalized, ffi::DataType::BF16, {num_rows, width}));
  return CheckCodedInputs(codes, scales, num_rows, width / kBlockColumns);
}

// Everything that coded_gemm gets; `segment.round_input` says that its inputs are codes.
inline ffi::Error ParseCodedGemm(const ffi::AnyBuffer& codes, const ffi::AnyBuffer& scales,
                                 const ffi::AnyBuffer& weight_codes,
                                 const ffi::AnyBuffer& weight_scales,
                                 const ffi::AnyBuffer& global_scale, const ffi::AnyBuffer& output,
                                 int32_t format, GemmSegment& segment) {
  if (format != static_cast<int32_t>(WeightFormat::kFp8Block) &&
      format != static_cast<int32_t>(WeightFormat::kMxfp4)) {
    return Invalid("format", std::to_string(format), "that of MXFP4 or of FP8 weights");
  }
  DSV4_CHECK(ExpectDtype("output", output, {ffi::DataType::BF16, ffi::DataType::F32}));
  DSV4_CHECK(ExpectShape("output", output, {kAnySize, kAnySize}));
  DSV4_CHECK(ExpectShape("input codes", codes, {kAnySize, kAnySize, kAnySize, kAnySize}));
  const int64_t blocks = codes.dimensions()[0];
  DSV4_CHECK(CheckCodedInputs(codes, scales, output.dimensions()[0], blocks));
  segment.format = static_cast<WeightFormat>(format);
  segment.round_input = true;
  segment.float_output = output.element_type() == ffi::DataType::F32;
  segment.num_outputs = static_cast<int32_t>(output.dimensions()[1]);
  DSV4_CHECK(CheckGemmWeight("weight", segment, weight_codes, weight_scales, global_scale,
                             blocks * kBlockColumns));
  segment.codes = static_cast<const uint8_t*>(weight_codes.untyped_data());
  segment.scales = static_cast<const uint8_t*>(weight_scales.untyped_data());
  segment.global_scale = global_scale.typed_data<float>();
  segment.output = output.untyped_data();
  return ffi::Error::Success();
}

}  // namespace dsv4
