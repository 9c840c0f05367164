// moe_ffn and grouped_gemm: experts on packed weights, one token and one row after the other.

#include "dsv4/moe.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dsv4/formats.h"
#include "tile_values.h"

namespace dsv4 {
namespace {

float RoundToBfloat16(float x) { return FromBfloat16(ToBfloat16(x)); }

// x W of each row of x [rows, inputs], rounded to bfloat16.
std::vector<float> Multiply(const std::vector<float>& x, WeightFormat format,
                            const ExpertWeight& weight, int64_t expert, int64_t outputs,
                            int64_t inputs) {
  const int64_t blocks = (outputs + kBlockRows - 1) / kBlockRows *
                         ((inputs + kBlockColumns - 1) / kBlockColumns);
  const TileValues values(format, weight.codes + expert * blocks * CodeBytes(format),
                          weight.scales + expert * blocks * ScaleBytes(format), inputs);
  const int64_t num_rows = x.size() / inputs;
  std::vector<float> y(num_rows * outputs), w(inputs);
  for (int64_t n = 0; n < outputs; ++n) {
    for (int64_t k = 0; k < inputs; ++k) w[k] = values.At(n, k);
    for (int64_t row = 0; row < num_rows; ++row) {
      double sum = 0;
      for (int64_t k = 0; k < inputs; ++k) sum += double{x[row * inputs + k]} * w[k];
      y[row * outputs + n] =
          RoundToBfloat16(static_cast<float>(sum) * weight.global_scale[expert]);
    }
  }
  return y;
}

std::vector<float> Inputs(const uint16_t* x, int64_t width, bool round) {
  std::vector<float> row(width);
  std::transform(x, x + width, row.begin(), FromBfloat16);
  if (round) RoundRow(row.data(), width);
  return row;
}

float ClampedSwiglu(float gate, float up, float limit) {
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return gate / (1.0f + std::exp(-gate)) * up;
}

void AddExpert(const MoeCall& call, const std::vector<float>& row, WeightFormat format,
               const ExpertWeights& weights, int64_t expert, float routing_weight, float* out) {
  std::vector<float> hidden = Multiply(row, format, weights.gate, expert, call.f, call.d);
  const std::vector<float> up = Multiply(row, format, weights.up, expert, call.f, call.d);
  for (int64_t i = 0; i < call.f; ++i) {
    hidden[i] = RoundToBfloat16(ClampedSwiglu(hidden[i], up[i], call.limit) * routing_weight);
  }
  if (call.round_input) RoundRow(hidden.data(), call.f);
  const std::vector<float> y = Multiply(hidden, format, weights.down, expert, call.d, call.f);
  for (int64_t i = 0; i < call.d; ++i) out[i] += y[i];
}

ffi::Error MoeFfn(ffi::AnyBuffer x, ffi::AnyBuffer weights, ffi::AnyBuffer expert_ids,
                  ffi::AnyBuffer valid, ffi::RemainingArgs projections,
                  ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> /*workspace*/,
                  int32_t weight_format, float limit, bool round_input) {
  MoeCall call;
  DSV4_CHECK(ParseMoe(x, weights, expert_ids, valid, projections, *out, weight_format, limit,
                      round_input, call));
  const ExpertWeights routed = {call.gate, call.up, call.down};
  std::fill_n(call.out, int64_t{call.num_tokens} * call.d, 0.0f);
  for (int64_t token = 0; token < call.num_tokens; ++token) {
    const std::vector<float> row = Inputs(call.x + token * call.d, call.d, call.round_input);
    float* out = call.out + token * call.d;
    for (int64_t route = token * call.top_k; route < (token + 1) * call.top_k; ++route) {
      const int32_t expert = call.expert_ids[route];
      if (!call.valid[token] || expert < 0 || expert >= call.num_experts) continue;
      AddExpert(call, row, call.format, routed, expert, call.weights[route], out);
    }
    if (call.has_shared) {
      AddExpert(call, row, WeightFormat::kFp8Block, call.shared, 0, 1.0f, out);
    }
  }
  return ffi::Error::Success();
}

ffi::Error GroupedGemm(ffi::AnyBuffer x, ffi::AnyBuffer group_sizes,
                       ffi::RemainingArgs weight, ffi::Result<ffi::AnyBuffer> out,
                       ffi::Result<ffi::AnyBuffer> /*workspace*/, int32_t weight_format,
                       bool round_input) {
  GroupedGemmCall call;
  DSV4_CHECK(ParseGroupedGemm(x, group_sizes, weight, *out, weight_format, round_input, call));
  int64_t row = 0;
  for (int64_t expert = 0; expert < call.num_experts; ++expert) {
    const int64_t end = std::min<int64_t>(row + call.group_sizes[expert], call.num_rows);
    std::vector<float> rows;
    for (int64_t i = row; i < end; ++i) {
      const std::vector<float> input =
          Inputs(call.x + i * call.inputs, call.inputs, call.round_input);
      rows.insert(rows.end(), input.begin(), input.end());
    }
    const std::vector<float> y =
        Multiply(rows, call.format, call.weight, expert, call.outputs, call.inputs);
    std::transform(y.begin(), y.end(), call.out + row * call.outputs, ToBfloat16);
    row = end;
  }
  std::fill(call.out + row * call.outputs, call.out + int64_t{call.num_rows} * call.outputs,
            uint16_t{0});
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_moe_ffn, MoeFfn,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("weight_format")
                                  .Attr<float>("limit")
                                  .Attr<bool>("round_input"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_grouped_gemm, GroupedGemm,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("weight_format")
                                  .Attr<bool>("round_input"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
