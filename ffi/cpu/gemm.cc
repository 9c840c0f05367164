// gemm: x Wᵀ for several tiled weights of the same input.

#include "dsv4/gemm.h"

#include <algorithm>
#include <vector>

#include "dsv4/formats.h"
#include "multiply_rows.h"

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

ffi::Error Gemm(ffi::RemainingArgs arguments, ffi::RemainingRets results,
                ffi::Span<const int32_t> formats, ffi::Span<const int32_t> rounded) {
  GemmCall call;
  DSV4_CHECK(ParseGemm(arguments, results, formats, rounded, call));
  const std::vector<float> plain = Inputs(call, false), round = Inputs(call, true);
  for (const GemmSegment& segment : call.segments) {
    const std::vector<float>& x = segment.round_input ? round : plain;
    MultiplyRows(segment, x.data(), call.num_rows, call.num_groups, call.width);
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
