// What the router's handlers require of their arguments, on every platform.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "dsv4/ffi.h"

namespace dsv4 {

constexpr int64_t kMaxTopK = 16;
constexpr int64_t kMaxExperts = 1024;
// Of one call of dense_router; tokens of one launch.
constexpr int64_t kMaxGateTokens = 64;
constexpr int64_t kMaxGateExperts = 384;
constexpr int64_t kMaxGateTopK = 8;
constexpr int64_t kGateSliceColumns = 64;  // slices are multiples of so many
constexpr int64_t kNvfp4ScaleGroup = 16;

inline ffi::Error ExpectRange(const char* name, int64_t got, int64_t lowest, int64_t highest) {
  if (lowest <= got && got <= highest) return ffi::Error::Success();
  return Invalid(name, std::to_string(got),
                 std::to_string(lowest) + " to " + std::to_string(highest));
}

inline ffi::Error ExpectTopK(int64_t num_experts, int64_t top_k, int64_t most = kMaxTopK) {
  DSV4_CHECK(ExpectRange("number of experts", num_experts, 1, kMaxExperts));
  return ExpectRange("top_k", top_k, 1, std::min(num_experts, most));
}

// gate [E, D] bfloat16, or NVFP4: packed [E, D / 2], scales [E, D / 16] and one global scale.
// A bfloat16 gate comes with empty scales.
inline ffi::Error ExpectGate(const ffi::AnyBuffer& x, const ffi::AnyBuffer& gate,
                             const ffi::AnyBuffer& scales, const ffi::AnyBuffer& global_scale) {
  DSV4_CHECK(Expect("x", x, ffi::DataType::BF16, {kAnySize, kAnySize}));
  DSV4_CHECK(ExpectDtype("gate", gate, {ffi::DataType::BF16, ffi::DataType::U8}));
  int64_t width = x.dimensions()[1];
  if (gate.element_type() == ffi::DataType::BF16) {
    DSV4_CHECK(ExpectMultiple("x's width", width, 8));
    return ExpectShape("gate", gate, {kAnySize, width});
  }
  DSV4_CHECK(ExpectMultiple("x's width", width, kNvfp4ScaleGroup));
  DSV4_CHECK(ExpectShape("gate", gate, {kAnySize, width / 2}));
  DSV4_CHECK(Expect("scales", scales, ffi::DataType::F8E4M3FN,
                    {gate.dimensions()[0], width / kNvfp4ScaleGroup}));
  return Expect("global_scale", global_scale, ffi::DataType::F32, {1});
}

// weights and ids [N, top_k].
inline ffi::Error ExpectRouting(int64_t num_tokens, const ffi::AnyBuffer& weights,
                                const ffi::AnyBuffer& ids) {
  DSV4_CHECK(Expect("ids", ids, ffi::DataType::S32, {num_tokens, kAnySize}));
  return Expect("weights", weights, ffi::DataType::F32, {num_tokens, ids.dimensions()[1]});
}

// Leading axes are batches; bias [E] or, batched, [.., E] of as many batches or 1.
inline ffi::Error ExpectActivationTopk(const ffi::AnyBuffer& logits, const ffi::AnyBuffer& bias,
                                       const ffi::AnyBuffer& weights, const ffi::AnyBuffer& ids) {
  DSV4_CHECK(ExpectDtype("logits", logits, {ffi::DataType::F32}));
  DSV4_CHECK(ExpectDtype("bias", bias, {ffi::DataType::F32}));
  DSV4_CHECK(ExpectDtype("weights", weights, {ffi::DataType::F32}));
  DSV4_CHECK(ExpectDtype("ids", ids, {ffi::DataType::S32}));
  int64_t num_experts = logits.dimensions().back(), top_k = ids.dimensions().back();
  DSV4_CHECK(ExpectTopK(num_experts, top_k));
  int64_t num_tokens = logits.element_count() / num_experts;
  int64_t num_biases = bias.element_count() / num_experts;
  if (bias.dimensions().back() != num_experts || num_biases == 0) {
    return Invalid("bias", ShapeText(bias.dimensions()), std::to_string(num_experts) + " experts");
  }
  return ExpectMultiple("rows of logits, by rows of bias", num_tokens, num_biases);
}

// `scratch` is what the blocks of a launch leave for each other: [N, E], or of more tokens than one
// launch takes [slices of the width, N, E rounded up to 4].
inline ffi::Error ExpectDenseRouter(const ffi::AnyBuffer& x, const ffi::AnyBuffer& gate,
                                    const ffi::AnyBuffer& scales,
                                    const ffi::AnyBuffer& global_scale, const ffi::AnyBuffer& bias,
                                    const ffi::AnyBuffer& weights, const ffi::AnyBuffer& ids,
                                    const ffi::AnyBuffer& scratch) {
  DSV4_CHECK(ExpectGate(x, gate, scales, global_scale));
  int64_t num_tokens = x.dimensions()[0], num_experts = gate.dimensions()[0];
  DSV4_CHECK(ExpectRange("experts", num_experts, 1, kMaxGateExperts));
  DSV4_CHECK(Expect("bias", bias, ffi::DataType::F32, {num_experts}));
  DSV4_CHECK(ExpectRouting(num_tokens, weights, ids));
  DSV4_CHECK(ExpectTopK(num_experts, ids.dimensions()[1], kMaxGateTopK));
  if (num_tokens <= kMaxGateTokens) {
    return Expect("scratch", scratch, ffi::DataType::F32, {num_tokens, num_experts});
  }
  DSV4_CHECK(ExpectRange("x's rows", num_tokens, 0, INT32_MAX / kMaxGateExperts));
  DSV4_CHECK(ExpectDtype("gate of more than 64 tokens", gate, {ffi::DataType::BF16}));
  DSV4_CHECK(Expect("scratch", scratch, ffi::DataType::F32,
                    {kAnySize, num_tokens, (num_experts + 3) / 4 * 4}));
  int64_t num_slices = scratch.dimensions()[0], width = x.dimensions()[1];
  return ExpectRange("slices", num_slices, 1, (width + kGateSliceColumns - 1) / kGateSliceColumns);
}

inline ffi::Error ExpectHashRouter(const ffi::AnyBuffer& x, const ffi::AnyBuffer& gate,
                                   const ffi::AnyBuffer& scales,
                                   const ffi::AnyBuffer& global_scale,
                                   const ffi::AnyBuffer& token_ids, const ffi::AnyBuffer& table,
                                   const ffi::AnyBuffer& weights, const ffi::AnyBuffer& ids) {
  DSV4_CHECK(ExpectGate(x, gate, scales, global_scale));
  int64_t num_tokens = x.dimensions()[0];
  DSV4_CHECK(Expect("token_ids", token_ids, ffi::DataType::S32, {num_tokens}));
  DSV4_CHECK(ExpectRouting(num_tokens, weights, ids));
  int64_t top_k = ids.dimensions()[1];
  DSV4_CHECK(ExpectTopK(gate.dimensions()[0], top_k));
  return Expect("table", table, ffi::DataType::S32, {kAnySize, top_k});
}

// rows = tokens * top_k routed rows; valid [tokens].
inline ffi::Error ExpectRoutePlan(const ffi::AnyBuffer& expert_ids, const ffi::AnyBuffer& valid,
                                  const ffi::AnyBuffer& tile_expert,
                                  const ffi::AnyBuffer& row_of_slot,
                                  const ffi::AnyBuffer& slot_of_row,
                                  const ffi::AnyBuffer& group_sizes, int64_t tile) {
  DSV4_CHECK(Expect("expert_ids", expert_ids, ffi::DataType::S32, {kAnySize}));
  int64_t num_rows = expert_ids.dimensions()[0];
  DSV4_CHECK(Expect("valid", valid, ffi::DataType::PRED, {kAnySize}));
  DSV4_CHECK(ExpectMultiple("expert_ids", num_rows, std::max<int64_t>(valid.element_count(), 1)));
  DSV4_CHECK(Expect("group_sizes", group_sizes, ffi::DataType::S32, {kAnySize}));
  int64_t num_experts = group_sizes.element_count();
  DSV4_CHECK(ExpectRange("num_experts", num_experts, 1, kMaxExperts));
  DSV4_CHECK(ExpectRange("tile", tile, 1, 1 << 20));
  int64_t num_tiles = num_rows / tile + std::min(num_experts, num_rows);
  DSV4_CHECK(Expect("tile_expert", tile_expert, ffi::DataType::S32, {num_tiles}));
  DSV4_CHECK(Expect("row_of_slot", row_of_slot, ffi::DataType::S32, {num_tiles * tile}));
  return Expect("slot_of_row", slot_of_row, ffi::DataType::S32, {num_rows});
}

}  // namespace dsv4
