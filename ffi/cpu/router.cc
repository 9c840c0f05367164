// The router on CPUs: activation_topk, dense_router, hash_router and route_plan.

#include "dsv4/router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "dsv4/ffi.h"
#include "dsv4/formats.h"

namespace dsv4 {
namespace {

float SqrtSoftplus(float x) {
  double wide = x;
  return static_cast<float>(std::sqrt(std::max(wide, 0.0) + std::log1p(std::exp(-std::abs(wide)))));
}

// score / sum of the scores, times scale.
void Normalize(const float* scores, int64_t top_k, float scale, float* weights) {
  float sum = std::max(std::accumulate(scores, scores + top_k, 0.0f), 1e-20f);
  for (int64_t i = 0; i < top_k; ++i) weights[i] = scores[i] / sum * scale;
}

// Best score plus bias first, the lower expert first among equals; NaN counts as +inf.
void Route(const std::vector<float>& scores, const float* bias, int64_t top_k, float scale,
           float* weights, int32_t* ids) {
  std::vector<float> biased(scores.size());
  for (size_t i = 0; i < scores.size(); ++i) {
    biased[i] = scores[i] + bias[i];
    if (std::isnan(biased[i])) biased[i] = std::numeric_limits<float>::infinity();
  }
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + top_k, order.end(), [&](int32_t a, int32_t b) {
    return biased[a] != biased[b] ? biased[a] > biased[b] : a < b;
  });
  std::copy_n(order.begin(), top_k, ids);
  std::vector<float> chosen(top_k);
  for (int64_t i = 0; i < top_k; ++i) chosen[i] = scores[ids[i]];
  Normalize(chosen.data(), top_k, scale, weights);
}

ffi::Error ActivationTopk(ffi::AnyBuffer logits, ffi::AnyBuffer bias, float scale,
                          ffi::Result<ffi::AnyBuffer> weights, ffi::Result<ffi::AnyBuffer> ids) {
  DSV4_CHECK(ExpectActivationTopk(logits, bias, *weights, *ids));
  int64_t num_experts = logits.dimensions().back(), top_k = ids->dimensions().back();
  int64_t num_tokens = logits.element_count() / num_experts;
  int64_t tokens_per_bias = num_tokens / (bias.element_count() / num_experts);
  std::vector<float> scores(num_experts);
  for (int64_t token = 0; token < num_tokens; ++token) {
    const float* row = logits.typed_data<float>() + token * num_experts;
    std::transform(row, row + num_experts, scores.begin(), SqrtSoftplus);
    Route(scores, bias.typed_data<float>() + token / tokens_per_bias * num_experts, top_k, scale,
          weights->typed_data<float>() + token * top_k, ids->typed_data<int32_t>() + token * top_k);
  }
  return ffi::Error::Success();
}

// The gate's rows, decoded; a global scale is left to the product.
class Gate {
 public:
  Gate(const ffi::AnyBuffer& gate, const ffi::AnyBuffer& scales,
       const ffi::AnyBuffer& global_scale, int64_t width)
      : weights_(gate.dimensions()[0] * width), width_(width) {
    if (gate.element_type() == ffi::DataType::BF16) {
      const auto* bits = static_cast<const uint16_t*>(gate.untyped_data());
      std::transform(bits, bits + weights_.size(), weights_.begin(), FromBfloat16);
      return;
    }
    const auto* codes = gate.typed_data<uint8_t>();
    const auto* scale_codes = static_cast<const uint8_t*>(scales.untyped_data());
    for (size_t i = 0; i < weights_.size(); ++i) {
      weights_[i] = DecodeE2m1(codes[i / 2] >> (i % 2 * 4)) *
                    DecodeE4m3(scale_codes[i / kNvfp4ScaleGroup]);
    }
    scale_ = global_scale.typed_data<float>()[0];
  }

  float Score(const uint16_t* x, int64_t expert) const {
    double sum = 0;
    for (int64_t i = 0; i < width_; ++i) sum += FromBfloat16(x[i]) * weights_[expert * width_ + i];
    return SqrtSoftplus(static_cast<float>(sum) * scale_);
  }

 private:
  std::vector<float> weights_;
  int64_t width_;
  float scale_ = 1.0f;
};

ffi::Error DenseRouter(ffi::AnyBuffer x, ffi::AnyBuffer gate, ffi::AnyBuffer scales,
                       ffi::AnyBuffer global_scale, ffi::AnyBuffer bias, float scale,
                       ffi::Result<ffi::AnyBuffer> weights, ffi::Result<ffi::AnyBuffer> ids,
                       ffi::Result<ffi::AnyBuffer> scratch) {
  DSV4_CHECK(ExpectDenseRouter(x, gate, scales, global_scale, bias, *weights, *ids, *scratch));
  int64_t num_tokens = x.dimensions()[0], width = x.dimensions()[1];
  int64_t num_experts = gate.dimensions()[0], top_k = ids->dimensions()[1];
  Gate rows(gate, scales, global_scale, width);
  std::vector<float> scores(num_experts);
  for (int64_t token = 0; token < num_tokens; ++token) {
    const auto* row = static_cast<const uint16_t*>(x.untyped_data()) + token * width;
    for (int64_t expert = 0; expert < num_experts; ++expert) {
      scores[expert] = rows.Score(row, expert);
    }
    Route(scores, bias.typed_data<float>(), top_k, scale,
          weights->typed_data<float>() + token * top_k, ids->typed_data<int32_t>() + token * top_k);
  }
  return ffi::Error::Success();
}

ffi::Error HashRouter(ffi::AnyBuffer x, ffi::AnyBuffer gate, ffi::AnyBuffer scales,
                      ffi::AnyBuffer global_scale, ffi::AnyBuffer token_ids, ffi::AnyBuffer table,
                      float scale, ffi::Result<ffi::AnyBuffer> weights,
                      ffi::Result<ffi::AnyBuffer> ids) {
  DSV4_CHECK(ExpectHashRouter(x, gate, scales, global_scale, token_ids, table, *weights, *ids));
  int64_t num_tokens = x.dimensions()[0], width = x.dimensions()[1];
  int64_t vocabulary = table.dimensions()[0], top_k = ids->dimensions()[1];
  Gate rows(gate, scales, global_scale, width);
  std::vector<float> scores(top_k);
  for (int64_t token = 0; token < num_tokens; ++token) {
    int32_t token_id = token_ids.typed_data<int32_t>()[token];
    int32_t* chosen = ids->typed_data<int32_t>() + token * top_k;
    float* weight = weights->typed_data<float>() + token * top_k;
    if (token_id < 0 || token_id >= vocabulary) {
      std::fill_n(chosen, top_k, -1);
      std::fill_n(weight, top_k, 0.0f);
      continue;
    }
    std::copy_n(table.typed_data<int32_t>() + token_id * top_k, top_k, chosen);
    const auto* row = static_cast<const uint16_t*>(x.untyped_data()) + token * width;
    for (int64_t i = 0; i < top_k; ++i) scores[i] = rows.Score(row, chosen[i]);
    Normalize(scores.data(), top_k, scale, weight);
  }
  return ffi::Error::Success();
}

ffi::Error RoutePlan(ffi::AnyBuffer expert_ids, ffi::AnyBuffer valid, int32_t tile,
                     ffi::Result<ffi::AnyBuffer> tile_expert,
                     ffi::Result<ffi::AnyBuffer> row_of_slot,
                     ffi::Result<ffi::AnyBuffer> slot_of_row,
                     ffi::Result<ffi::AnyBuffer> group_sizes) {
  DSV4_CHECK(ExpectRoutePlan(expert_ids, valid, *tile_expert, *row_of_slot, *slot_of_row,
                             *group_sizes, tile));
  int32_t num_rows = expert_ids.element_count(), num_experts = group_sizes->element_count();
  int32_t num_slots = row_of_slot->element_count();
  int32_t rows_per_token = num_rows / std::max<int64_t>(valid.element_count(), 1);
  const int32_t* experts = expert_ids.typed_data<int32_t>();
  int32_t* rows = row_of_slot->typed_data<int32_t>();
  int32_t* slots = slot_of_row->typed_data<int32_t>();
  int32_t* sizes = group_sizes->typed_data<int32_t>();
  auto takes_part = [&](int32_t row) {
    return 0 <= experts[row] && experts[row] < num_experts &&
           valid.typed_data<bool>()[row / rows_per_token];
  };
  std::fill_n(sizes, num_experts, 0);
  for (int32_t row = 0; row < num_rows; ++row) {
    if (takes_part(row)) ++sizes[experts[row]];
  }
  std::vector<int32_t> next(num_experts);
  int32_t* tile_experts = tile_expert->typed_data<int32_t>();
  std::fill_n(tile_experts, tile_expert->element_count(), num_experts - 1);
  int32_t num_tiles = 0;
  for (int32_t expert = 0; expert < num_experts; ++expert) {
    int32_t tiles = (sizes[expert] + tile - 1) / tile;
    next[expert] = num_tiles * tile;
    std::fill_n(tile_experts + num_tiles, tiles, expert);
    num_tiles += tiles;
  }
  std::fill_n(rows, num_slots, num_rows);
  for (int32_t row = 0; row < num_rows; ++row) {
    slots[row] = takes_part(row) ? next[experts[row]]++ : num_slots;
    if (slots[row] < num_slots) rows[slots[row]] = row;
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_activation_topk, ActivationTopk,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_dense_router, DenseRouter,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_hash_router, HashRouter,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_route_plan, RoutePlan,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<int32_t>("tile")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
