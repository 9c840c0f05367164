// nvfp4_quantize: codes, swizzled block scales and global scales of a matrix.

#include <algorithm>
#include <vector>

#include "dsv4/ffi.h"
#include "dsv4/nvfp4.h"
#include "dsv4/quantize.h"

namespace dsv4 {
namespace {

float Amax(const float* x, int64_t count) {
  uint32_t bits = 0;  // As integers NaNs are above infinity and all numbers.
  for (int64_t i = 0; i < count; ++i) bits = std::max(bits, BitCast<uint32_t>(x[i]) & 0x7fffffffu);
  return BitCast<float>(bits);
}

std::vector<float> AsFloat(const ffi::AnyBuffer& x) {
  std::vector<float> values(x.element_count());
  if (x.element_type() == ffi::DataType::F32) {
    std::copy_n(x.typed_data<float>(), values.size(), values.begin());
  } else {
    const auto* bits = static_cast<const uint16_t*>(x.untyped_data());
    std::transform(bits, bits + values.size(), values.begin(), FromBfloat16);
  }
  return values;
}

ffi::Error Nvfp4Quantize(ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> packed,
                         ffi::Result<ffi::AnyBuffer> scales,
                         ffi::Result<ffi::AnyBuffer> global_scale,
                         ffi::Result<ffi::AnyBuffer> workspace) {
  DSV4_CHECK(CheckNvfp4Quantize(x, *packed, *scales, *global_scale, *workspace));
  const int64_t num_rows = x.dimensions()[0], width = x.dimensions()[1];
  const bool per_row = global_scale->dimensions().size() == 1;
  const std::vector<float> values = AsFloat(x);
  auto* codes = packed->typed_data<uint8_t>();
  auto* swizzled = static_cast<uint8_t*>(scales->untyped_data());
  auto* globals = global_scale->typed_data<float>();
  std::fill_n(swizzled, scales->element_count(), uint8_t{0});
  float global = Nvfp4GlobalScale(Amax(values.data(), values.size()));
  if (!per_row) globals[0] = global;
  for (int64_t row = 0; row < num_rows; ++row) {
    const float* source = values.data() + row * width;
    if (per_row) globals[row] = global = Nvfp4GlobalScale(Amax(source, width));
    for (int64_t group = 0; group < width / kNvfp4Group; ++group) {
      const float* element = source + group * kNvfp4Group;
      float amax = Amax(element, kNvfp4Group);
      uint32_t scale = Nvfp4BlockScale(amax, global, EncodeE4m3(amax / (kLargestE2m1 * global)));
      float unit = Nvfp4Unit(scale, global);
      swizzled[SwizzledScaleOffset(row, group, scales->dimensions()[1])] = scale;
      for (int pair = 0; pair < kNvfp4Group / 2; ++pair) {
        uint32_t even = EncodeE2m1(element[2 * pair], unit);
        *codes++ = even | EncodeE2m1(element[2 * pair + 1], unit) << 4;
      }
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_nvfp4_quantize, Nvfp4Quantize,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
