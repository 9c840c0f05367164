// The arguments of gemm, the same for every platform.
//
// Operands: x [rows, groups, width], then codes, scales and global scale of each segment.
// Results: an output [rows, outputs] of each segment, then the workspace.
#pragma once

#include <string>
#include <vector>

#include "dsv4/ffi.h"
#include "dsv4/gemm_segment.h"

namespace dsv4 {

struct GemmCall {
  const uint16_t* x;
  int32_t num_rows, num_groups, width;
  std::vector<GemmSegment> segments;
  uint8_t* workspace;
};

// Up to this many rows weights meet the input as it is; beyond, a tiled copy of it in the
// workspace, one as it is and one rounded.
constexpr int kMaxStreamedRows = 16;

inline int64_t GemmCopyBytes(const GemmCall& call) {
  return CeilDiv(call.num_rows, 8) * 8 * call.num_groups * CeilDiv(call.width, kBlockColumns) *
         kBlockColumns * 2;
}

inline ffi::Error CheckGemmWeight(const std::string& name, const GemmSegment& segment,
                                  const ffi::AnyBuffer& codes, const ffi::AnyBuffer& scales,
                                  const ffi::AnyBuffer& global_scale, int64_t width) {
  const int64_t bn = CeilDiv(segment.num_outputs, kBlockRows), bk = CeilDiv(width, kBlockColumns);
  DSV4_CHECK(Expect((name + " codes").c_str(), codes, ffi::DataType::U32,
                    {bn, bk, kWarpTilesPerBlock, NumChunks(segment.format), 32, 4}));
  DSV4_CHECK(ExpectAligned((name + " codes").c_str(), codes, 16));
  DSV4_CHECK(ExpectDtype((name + " scales").c_str(), scales, {ffi::DataType::U8}));
  const int64_t num_scales = bn * bk * ScaleBytes(segment.format);
  if (static_cast<int64_t>(scales.element_count()) != num_scales) {
    return Invalid(name + " scales", "shape " + ShapeText(scales.dimensions()),
                   std::to_string(num_scales) + " bytes");
  }
  return Expect((name + " global_scale").c_str(), global_scale, ffi::DataType::F32, {});
}

inline ffi::Error ParseGemm(ffi::RemainingArgs arguments, ffi::RemainingRets results,
                            ffi::Span<const int32_t> formats, ffi::Span<const int32_t> rounded,
                            GemmCall& call) {
  const size_t num_segments = formats.size();
  if (num_segments == 0 || num_segments > kMaxGemmSegments) {
    return Invalid("segments", std::to_string(num_segments),
                   "1 to " + std::to_string(kMaxGemmSegments));
  }
  if (rounded.size() != num_segments || arguments.size() != 1 + 3 * num_segments ||
      results.size() != num_segments + 1) {
    return Invalid("segments", std::to_string(arguments.size()) + " operands",
                   std::to_string(1 + 3 * num_segments));
  }
  auto x = arguments.get<ffi::AnyBuffer>(0).value();
  DSV4_CHECK(Expect("x", x, ffi::DataType::BF16, {kAnySize, kAnySize, kAnySize}));
  DSV4_CHECK(ExpectMultiple("x: width", x.dimensions()[2], 8));
  DSV4_CHECK(ExpectAligned("x", x, 16));
  call.x = static_cast<const uint16_t*>(x.untyped_data());
  call.num_rows = static_cast<int32_t>(x.dimensions()[0]);
  call.num_groups = static_cast<int32_t>(x.dimensions()[1]);
  call.width = static_cast<int32_t>(x.dimensions()[2]);
  bool plain = false, any_rounded = false;
  for (size_t i = 0; i < num_segments; ++i) {
    const std::string name = "segment " + std::to_string(i);
    auto codes = arguments.get<ffi::AnyBuffer>(1 + 3 * i).value();
    auto scales = arguments.get<ffi::AnyBuffer>(2 + 3 * i).value();
    auto global_scale = arguments.get<ffi::AnyBuffer>(3 + 3 * i).value();
    auto output = results.get<ffi::AnyBuffer>(i).value();
    if (formats[i] < 0 || formats[i] >= kNumWeightFormats) {
      return Invalid(name + " format", std::to_string(formats[i]), "0 to 3");
    }
    DSV4_CHECK(ExpectDtype((name + " output").c_str(), *output,
                           {ffi::DataType::BF16, ffi::DataType::F32}));
    DSV4_CHECK(ExpectShape((name + " output").c_str(), *output, {call.num_rows, kAnySize}));
    GemmSegment segment;
    segment.format = static_cast<WeightFormat>(formats[i]);
    segment.round_input = rounded[i] != 0;
    segment.float_output = output->element_type() == ffi::DataType::F32;
    segment.num_outputs = static_cast<int32_t>(output->dimensions()[1]);
    DSV4_CHECK(CheckGemmWeight(name, segment, codes, scales, global_scale, call.width));
    if (call.num_groups > 1) {
      DSV4_CHECK(ExpectMultiple((name + " outputs").c_str(), segment.num_outputs,
                                int64_t{call.num_groups} * 2 * kBlockRows));
    }
    segment.codes = static_cast<const uint8_t*>(codes.untyped_data());
    segment.scales = static_cast<const uint8_t*>(scales.untyped_data());
    segment.global_scale = global_scale.typed_data<float>();
    segment.output = output->untyped_data();
    call.segments.push_back(segment);
    (segment.round_input ? any_rounded : plain) = true;
  }
  auto workspace = results.get<ffi::AnyBuffer>(num_segments).value();
  call.workspace = static_cast<uint8_t*>(workspace->untyped_data());
  const int64_t copies = call.num_rows <= kMaxStreamedRows ? 0 : plain + any_rounded;
  return Expect("workspace", *workspace, ffi::DataType::U8, {copies * GemmCopyBytes(call)});
}

}  // namespace dsv4
