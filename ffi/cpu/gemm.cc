// gemm: x Wᵀ for several tiled weights of the same input.

#include "dsv4/gemm.h"

#include <algorithm>
#include <vector>

#include "dsv4/formats.h"
#include "tile_values.h"

namespace dsv4 {
namespace {

std::vector<float> Inputs(const GemmCall& call, bool round) {
  const int64_t count = int64_t{call.num_rows} * call.num_groups * call.width;
  std::vector<float> x(count);
  std::transform(call.x, call.x + count, x.begin(), FromBfloat16);
  if (round) {
    for (int64_t row = 0; row < count; row += call.width) RoundRow(x.data() + row, call.width);
  }
  return x;
}

void Multiply(const GemmCall& call, const GemmSegment& segment, const std::vector<float>& x) {
  const TileValues tiles(segment.format, segment.codes, segment.scales, call.width);
  const int64_t outputs_per_group = segment.num_outputs / call.num_groups;
  std::vector<float> weights(call.width);
  for (int64_t n = 0; n < segment.num_outputs; ++n) {
    for (int64_t k = 0; k < call.width; ++k) weights[k] = tiles.At(n, k);
    for (int64_t row = 0; row < call.num_rows; ++row) {
      const float* input = x.data() + (row * call.num_groups + n / outputs_per_group) * call.width;
      double sum = 0;
      for (int64_t k = 0; k < call.width; ++k) sum += double{input[k]} * weights[k];
      const float y = static_cast<float>(sum * *segment.global_scale);
      const int64_t index = row * segment.num_outputs + n;
      if (segment.float_output) {
        static_cast<float*>(segment.output)[index] = y;
      } else {
        static_cast<uint16_t*>(segment.output)[index] = ToBfloat16(y);
      }
    }
  }
}

ffi::Error Gemm(ffi::RemainingArgs arguments, ffi::RemainingRets results,
                ffi::Span<const int32_t> formats, ffi::Span<const int32_t> rounded) {
  GemmCall call;
  DSV4_CHECK(ParseGemm(arguments, results, formats, rounded, call));
  const std::vector<float> plain = Inputs(call, false), round = Inputs(call, true);
  for (const GemmSegment& segment : call.segments) {
    Multiply(call, segment, segment.round_input ? round : plain);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_gemm, Gemm,
                              ffi::Ffi::Bind()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int32_t>>("formats")
                                  .Attr<ffi::Span<const int32_t>>("rounded"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
