// The arguments of moe_ffn and grouped_gemm, the same for every platform.
#pragma once

#include <string>

#include "dsv4/ffi.h"
#include "dsv4/tiled.h"

namespace dsv4 {

// A stack of tiled weights [num_experts, outputs, inputs].
struct ExpertWeight {
  const uint8_t* codes;
  const uint8_t* scales;
  const float* global_scale;
};

struct ExpertWeights {
  ExpertWeight gate, up, down;
};

struct MoeCall {
  WeightFormat format;
  const uint16_t* x;  // bfloat16 [num_tokens, d]
  const float* weights;
  const int32_t* expert_ids;
  const bool* valid;
  ExpertWeight gate, up, down;
  bool has_shared;  // an expert of all tokens, in FP8
  ExpertWeights shared;
  float* out;  // [num_tokens, d]
  int num_tokens, top_k, num_experts, d, f;
  float limit;
  bool round_input;
};

struct GroupedGemmCall {
  WeightFormat format;
  const uint16_t* x;  // bfloat16 [num_rows, inputs], sorted by group
  const int32_t* group_sizes;
  ExpertWeight weight;
  uint16_t* out;  // bfloat16 [num_rows, outputs]; zeros after the last group
  int num_rows, num_experts, inputs, outputs;
  bool round_input;
};

inline ffi::Error ParseWeightFormat(int32_t number, WeightFormat& format) {
  if (number < 0 || number >= kNumWeightFormats) {
    return Invalid("weight_format", std::to_string(number), "0 to 3");
  }
  format = static_cast<WeightFormat>(number);
  return ffi::Error::Success();
}

// Codes, scales and global scale, from `arrays[first]` on.
inline ffi::Error ParseExpertWeight(const std::string& name, WeightFormat format,
                                    int64_t num_experts, int64_t outputs, int64_t inputs,
                                    const ffi::RemainingArgs& arrays, size_t first,
                                    ExpertWeight& weight) {
  const auto codes = arrays.get<ffi::AnyBuffer>(first).value();
  const auto scales = arrays.get<ffi::AnyBuffer>(first + 1).value();
  const auto global_scale = arrays.get<ffi::AnyBuffer>(first + 2).value();
  const int64_t bn = (outputs + kBlockRows - 1) / kBlockRows;
  const int64_t bk = (inputs + kBlockColumns - 1) / kBlockColumns;
  DSV4_CHECK(Expect((name + " codes").c_str(), codes, ffi::DataType::U32,
                    {num_experts, bn, bk, kWarpTilesPerBlock, NumChunks(format), 32, 4}));
  DSV4_CHECK(ExpectAligned((name + " codes").c_str(), codes, 16));
  DSV4_CHECK(ExpectDtype((name + " scales").c_str(), scales, {ffi::DataType::U8}));
  DSV4_CHECK(ExpectAligned((name + " scales").c_str(), scales, 16));
  const int64_t num_scales = num_experts * bn * bk * ScaleBytes(format);
  if (static_cast<int64_t>(scales.element_count()) != num_scales) {
    return Invalid(name + " scales", "shape " + ShapeText(scales.dimensions()),
                   std::to_string(num_scales) + " bytes");
  }
  DSV4_CHECK(Expect((name + " global_scale").c_str(), global_scale, ffi::DataType::F32,
                    {num_experts}));
  weight = {static_cast<const uint8_t*>(codes.untyped_data()),
            static_cast<const uint8_t*>(scales.untyped_data()), global_scale.typed_data<float>()};
  return ffi::Error::Success();
}

inline ffi::Error ParseExpertWeights(const std::string& prefix, WeightFormat format,
                                     int64_t num_experts, int64_t d, int64_t f,
                                     const ffi::RemainingArgs& arrays, size_t first,
                                     ExpertWeights& weights) {
  const auto parse = [&](const char* name, int64_t outputs, int64_t inputs, size_t at,
                         ExpertWeight& weight) {
    return ParseExpertWeight(prefix + name, format, num_experts, outputs, inputs, arrays, at,
                             weight);
  };
  DSV4_CHECK(parse("w1", f, d, first, weights.gate));
  DSV4_CHECK(parse("w3", f, d, first + 3, weights.up));
  return parse("w2", d, f, first + 6, weights.down);
}

// `projections` are the arrays of w1, w3 and w2, and after them those of the shared expert if there
// is one. The hidden size is that of the blocks of w1.
inline ffi::Error ParseMoe(const ffi::AnyBuffer& x, const ffi::AnyBuffer& weights,
                           const ffi::AnyBuffer& expert_ids, const ffi::AnyBuffer& valid,
                           const ffi::RemainingArgs& projections, const ffi::AnyBuffer& out,
                           int32_t weight_format, float limit, bool round_input, MoeCall& call) {
  constexpr size_t kArrays = 9;
  if (projections.size() != kArrays && projections.size() != 2 * kArrays) {
    return Invalid("weights", std::to_string(projections.size()) + " arrays", "9 or 18");
  }
  DSV4_CHECK(Expect("x", x, ffi::DataType::BF16, {kAnySize, kAnySize}));
  DSV4_CHECK(ExpectAligned("x", x, 16));
  const int64_t num_tokens = x.dimensions()[0], d = x.dimensions()[1];
  DSV4_CHECK(Expect("weights", weights, ffi::DataType::F32, {num_tokens, kAnySize}));
  const int64_t top_k = weights.dimensions()[1];
  DSV4_CHECK(Expect("expert_ids", expert_ids, ffi::DataType::S32, {num_tokens, top_k}));
  DSV4_CHECK(Expect("valid", valid, ffi::DataType::PRED, {num_tokens}));
  DSV4_CHECK(Expect("out", out, ffi::DataType::F32, {num_tokens, d}));
  DSV4_CHECK(ParseWeightFormat(weight_format, call.format));
  const auto codes = projections.get<ffi::AnyBuffer>(0).value();
  DSV4_CHECK(ExpectShape("w1 codes", codes,
                         {kAnySize, kAnySize, kAnySize, kAnySize, kAnySize, kAnySize, kAnySize}));
  const int64_t num_experts = codes.dimensions()[0], f = codes.dimensions()[1] * kBlockRows;
  ExpertWeights routed;
  DSV4_CHECK(ParseExpertWeights("", call.format, num_experts, d, f, projections, 0, routed));
  call.gate = routed.gate;
  call.up = routed.up;
  call.down = routed.down;
  call.has_shared = projections.size() > kArrays;
  if (call.has_shared) {
    DSV4_CHECK(ParseExpertWeights("shared ", WeightFormat::kFp8Block, 1, d, f, projections, kArrays,
                                  call.shared));
  }
  call.x = static_cast<const uint16_t*>(x.untyped_data());
  call.weights = weights.typed_data<float>();
  call.expert_ids = expert_ids.typed_data<int32_t>();
  call.valid = valid.typed_data<bool>();
  call.out = out.typed_data<float>();
  call.num_tokens = static_cast<int>(num_tokens);
  call.top_k = static_cast<int>(top_k);
  call.num_experts = static_cast<int>(num_experts);
  call.d = static_cast<int>(d);
  call.f = static_cast<int>(f);
  call.limit = limit;
  call.round_input = round_input;
  return ffi::Error::Success();
}

inline ffi::Error ParseGroupedGemm(const ffi::AnyBuffer& x, const ffi::AnyBuffer& group_sizes,
                                   const ffi::RemainingArgs& weight, const ffi::AnyBuffer& out,
                                   int32_t weight_format, bool round_input,
                                   GroupedGemmCall& call) {
  if (weight.size() != 3) return Invalid("weight", std::to_string(weight.size()) + " arrays", "3");
  DSV4_CHECK(Expect("x", x, ffi::DataType::BF16, {kAnySize, kAnySize}));
  DSV4_CHECK(ExpectAligned("x", x, 16));
  const int64_t num_rows = x.dimensions()[0], inputs = x.dimensions()[1];
  DSV4_CHECK(Expect("out", out, ffi::DataType::BF16, {num_rows, kAnySize}));
  DSV4_CHECK(Expect("group_sizes", group_sizes, ffi::DataType::S32, {kAnySize}));
  const int64_t outputs = out.dimensions()[1], num_experts = group_sizes.dimensions()[0];
  DSV4_CHECK(ParseWeightFormat(weight_format, call.format));
  DSV4_CHECK(ParseExpertWeight("weight", call.format, num_experts, outputs, inputs, weight, 0,
                               call.weight));
  call.x = static_cast<const uint16_t*>(x.untyped_data());
  call.group_sizes = group_sizes.typed_data<int32_t>();
  call.out = static_cast<uint16_t*>(out.untyped_data());
  call.num_rows = static_cast<int>(num_rows);
  call.num_experts = static_cast<int>(num_experts);
  call.inputs = static_cast<int>(inputs);
  call.outputs = static_cast<int>(outputs);
  call.round_input = round_input;
  return ffi::Error::Success();
}

}  // namespace dsv4
