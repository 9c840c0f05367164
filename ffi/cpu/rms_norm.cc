// rms_norm: row after row.

#include "dsv4/rms_norm.h"

#include <vector>

#include "cache_entry.h"

namespace dsv4 {
namespace {

ffi::Error RmsNorm(ffi::AnyBuffer x, ffi::AnyBuffer weight,
                   ffi::Result<ffi::AnyBuffer> normalized, float eps) {
  NormCall call;
  DSV4_CHECK(CheckNorm(x, weight, *normalized, eps, &call));
  std::vector<float> row(call.width);
  for (int64_t i = 0; i < call.num_rows * call.width; i += call.width) {
    for (int j = 0; j < call.width; ++j) row[j] = FromBfloat16(call.x[i + j]);
    const float scale = InverseRms(row.data(), call.width, eps);
    for (int j = 0; j < call.width; ++j) {
      call.normalized[i + j] = ToBfloat16(row[j] * scale * call.weight[j]);
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_rms_norm, RmsNorm,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
