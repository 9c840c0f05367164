// The arguments of nvfp4_gemm and nvfp4_grouped_gemm, products of two NVFP4 operands, the same for
// every platform. Both operands are laid out as nvfp4_quantize does it.
#pragma once

#include <string>

#include "dsv4/ffi.h"
#include "dsv4/nvfp4.h"

namespace dsv4 {

// Rows with one global scale each (tokens) or one for each matrix of them (weights).
struct Nvfp4Operand {
  const uint8_t* codes;   // [matrices, rows, width / 2]
  const uint8_t* scales;  // [matrices, ceil(rows / 128), ceil(width / 64), 512]
  const float* global_scales;
};

// out[t, f] = tokens[t] . weights[group of t, f]. Group g has the next group_sizes[g] tokens.
struct Nvfp4GemmCall {
  Nvfp4Operand tokens, weights;
  const int32_t* group_sizes;  // on the device; null: one group
  int64_t num_tokens, num_features, width, num_groups;
  uint16_t* out;  // bfloat16 [tokens, features]
};

inline ffi::Error ParseNvfp4Operand(const std::string& name, const ffi::AnyBuffer& codes,
                                    const ffi::AnyBuffer& scales,
                                    const ffi::AnyBuffer& global_scales, Nvfp4Operand& operand) {
  const std::string scales_name = name + "_scales";
  DSV4_CHECK(ExpectDtype(name.c_str(), codes, {ffi::DataType::U8}));
  const auto sizes = codes.dimensions();
  const bool stacked = sizes.size() == 3;
  const int64_t rows = sizes[stacked], width = 2 * sizes[stacked + 1];
  // Rows of a tensor map begin at multiples of 16 bytes.
  DSV4_CHECK(ExpectMultiple((name + ": width").c_str(), width, 32));
  const int64_t row_blocks = (rows + kScaleBlockRows - 1) / kScaleBlockRows;
  const int64_t group_blocks = (width / kNvfp4Group + kScaleBlockGroups - 1) / kScaleBlockGroups;
  DSV4_CHECK(ExpectDtype(scales_name.c_str(), scales, {ffi::DataType::F8E4M3FN}));
  DSV4_CHECK(stacked ? ExpectShape(scales_name.c_str(), scales,
                                   {sizes[0], row_blocks, group_blocks, kScaleBlockBytes})
                     : ExpectShape(scales_name.c_str(), scales,
                                   {row_blocks, group_blocks, kScaleBlockBytes}));
  DSV4_CHECK(ExpectDtype((name + "_global_scale").c_str(), global_scales, {ffi::DataType::F32}));
  DSV4_CHECK(ExpectAligned(name.c_str(), codes, 16));
  DSV4_CHECK(ExpectAligned(scales_name.c_str(), scales, 16));
  operand = {codes.typed_data<uint8_t>(), static_cast<const uint8_t*>(scales.untyped_data()),
             global_scales.typed_data<float>()};
  return ffi::Error::Success();
}

// Operands: tokens and weights, each as codes, scales and global scales; then, where weights are
// stacked matrices, the groups' sizes.
inline ffi::Error ParseNvfp4Gemm(const ffi::RemainingArgs& operands, const ffi::AnyBuffer& out,
                                 Nvfp4GemmCall& call) {
  if (operands.size() != 6 && operands.size() != 7) {
    return Invalid("operands", std::to_string(operands.size()), "6, or 7 with group_sizes");
  }
  const auto operand = [&](size_t i) { return operands.get<ffi::AnyBuffer>(i).value(); };
  const ffi::AnyBuffer tokens = operand(0), weights = operand(3);
  DSV4_CHECK(ExpectShape("tokens", tokens, {kAnySize, kAnySize}));
  call.num_tokens = tokens.dimensions()[0];
  call.width = 2 * tokens.dimensions()[1];
  call.num_groups = 1;
  call.group_sizes = nullptr;
  if (operands.size() == 7) {
    const ffi::AnyBuffer group_sizes = operand(6);
    DSV4_CHECK(ExpectShape("weights", weights, {kAnySize, kAnySize, call.width / 2}));
    call.num_groups = weights.dimensions()[0];
    DSV4_CHECK(ExpectShape("weights_global_scale", operand(5), {call.num_groups}));
    DSV4_CHECK(Expect("group_sizes", group_sizes, ffi::DataType::S32, {call.num_groups}));
    call.group_sizes = group_sizes.typed_data<int32_t>();
    call.num_features = weights.dimensions()[1];
  } else {
    DSV4_CHECK(ExpectShape("weights", weights, {kAnySize, call.width / 2}));
    DSV4_CHECK(ExpectShape("weights_global_scale", operand(5), {}));
    call.num_features = weights.dimensions()[0];
  }
  DSV4_CHECK(ParseNvfp4Operand("tokens", tokens, operand(1), operand(2), call.tokens));
  DSV4_CHECK(ExpectShape("tokens_global_scale", operand(2), {call.num_tokens}));
  DSV4_CHECK(ParseNvfp4Operand("weights", weights, operand(4), operand(5), call.weights));
  DSV4_CHECK(Expect("out", out, ffi::DataType::BF16, {call.num_tokens, call.num_features}));
  call.out = static_cast<uint16_t*>(out.untyped_data());
  return ffi::Error::Success();
}

}  // namespace dsv4
