// nvfp4_gemm, nvfp4_grouped_gemm: products of two NVFP4 operands, summed in double.

#include "dsv4/nvfp4_gemm.h"

#include <vector>

namespace dsv4 {
namespace {

// Row `row` of matrix `matrix`, without the global scale.
void DecodeRow(const Nvfp4Operand& operand, int64_t matrix, int64_t row, int64_t rows,
               int64_t width, double* values) {
  const int64_t row_blocks = (rows + kScaleBlockRows - 1) / kScaleBlockRows;
  const int64_t group_blocks = (width / kNvfp4Group + kScaleBlockGroups - 1) / kScaleBlockGroups;
  const uint8_t* codes = operand.codes + (matrix * rows + row) * width / 2;
  const uint8_t* scales =
      operand.scales + matrix * row_blocks * group_blocks * kScaleBlockBytes;
  for (int64_t k = 0; k < width; ++k) {
    const uint32_t code = codes[k / 2] >> 4 * (k % 2) & 15u;
    const int64_t offset = SwizzledScaleOffset(row, k / kNvfp4Group, group_blocks);
    values[k] = double{DecodeE2m1(code)} * DecodeE4m3(scales[offset]);
  }
}

ffi::Error Multiply(const Nvfp4GemmCall& call) {
  std::vector<double> token(call.width), weights(call.num_features * call.width);
  int64_t next = 0;
  for (int64_t group = 0; group < call.num_groups; ++group) {
    const int64_t size = call.group_sizes ? call.group_sizes[group] : call.num_tokens;
    if (size < 0 || next + size > call.num_tokens) {
      return Invalid("group_sizes", "more than the tokens up to group " + std::to_string(group),
                     std::to_string(call.num_tokens) + " in all");
    }
    for (int64_t feature = 0; size > 0 && feature < call.num_features; ++feature) {
      DecodeRow(call.weights, group, feature, call.num_features, call.width,
                weights.data() + feature * call.width);
    }
    for (const int64_t end = next + size; next < end; ++next) {
      DecodeRow(call.tokens, 0, next, call.num_tokens, call.width, token.data());
      for (int64_t feature = 0; feature < call.num_features; ++feature) {
        double sum = 0;
        const double* weight = weights.data() + feature * call.width;
        for (int64_t k = 0; k < call.width; ++k) sum += token[k] * weight[k];
        const float value = static_cast<float>(sum) * call.weights.global_scales[group] *
                            call.tokens.global_scales[next];
        call.out[next * call.num_features + feature] = ToBfloat16(value);
      }
    }
  }
  for (int64_t i = next * call.num_features; i < call.num_tokens * call.num_features; ++i) {
    call.out[i] = 0;
  }
  return ffi::Error::Success();
}

ffi::Error Nvfp4Gemm(ffi::RemainingArgs operands, ffi::Result<ffi::AnyBuffer> out) {
  Nvfp4GemmCall call;
  DSV4_CHECK(ParseNvfp4Gemm(operands, *out, call));
  return Multiply(call);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_nvfp4_gemm, Nvfp4Gemm,
                              ffi::Ffi::Bind().RemainingArgs().Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_nvfp4_grouped_gemm, Nvfp4Gemm,
                              ffi::Ffi::Bind().RemainingArgs().Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
