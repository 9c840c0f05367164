// rms_norm_quantize and coded_gemm: inputs to E4M3 codes, and products of such codes.

#include "dsv4/coded_inputs.h"

#include <cmath>
#include <vector>

#include "dsv4/formats.h"
#include "multiply_rows.h"

namespace dsv4 {
namespace {

// Of input `column` of a block of 128, in a row of a tile.
int64_t CodeOffset(int64_t row_in_tile, int64_t column) {
  constexpr int kByte[] = {1, 3, 0, 2};
  const int64_t part = (column % 32 / 4) ^ row_in_tile;
  return row_in_tile * kBlockColumns + part * 16 + column / 32 * 4 + kByte[column % 4];
}

struct Place {
  int64_t code, scale;
};

Place PlaceOf(int64_t row, int64_t column, int64_t row_tiles) {
  const int64_t block = column / kBlockColumns;
  const int64_t tile = block * row_tiles + row / kInputTileRows;
  return {tile * kInputTileRows * kBlockColumns +
              CodeOffset(row % kInputTileRows, column % kBlockColumns),
          block * row_tiles * kInputTileRows + row};
}

ffi::Error NormQuantize(ffi::AnyBuffer x, ffi::AnyBuffer weight,
                        ffi::Result<ffi::AnyBuffer> normalized, ffi::Result<ffi::AnyBuffer> codes,
                        ffi::Result<ffi::AnyBuffer> scales, float eps) {
  DSV4_CHECK(CheckNormQuantize(x, weight, *normalized, *codes, *scales));
  const int64_t num_rows = x.dimensions()[0], width = x.dimensions()[1];
  const int64_t row_tiles = CeilDiv(num_rows, kInputTileRows);
  const auto* inputs = static_cast<const uint16_t*>(x.untyped_data());
  const auto* factors = weight.typed_data<float>();
  auto* outputs = static_cast<uint16_t*>(normalized->untyped_data());
  auto* code_bytes = static_cast<uint8_t*>(codes->untyped_data());
  auto* scale_values = scales->typed_data<float>();
  std::vector<float> y(width);
  for (int64_t row = 0; row < row_tiles * kInputTileRows; ++row) {
    std::fill(y.begin(), y.end(), 0.0f);
    if (row < num_rows) {
      double squares = 0;
      for (int64_t i = 0; i < width; ++i) {
        const double value = FromBfloat16(inputs[row * width + i]);
        squares += value * value;
      }
      const float scale = static_cast<float>(1 / std::sqrt(squares / width + eps));
      for (int64_t i = 0; i < width; ++i) {
        outputs[row * width + i] =
            ToBfloat16(FromBfloat16(inputs[row * width + i]) * scale * factors[i]);
        y[i] = FromBfloat16(outputs[row * width + i]);
      }
    }
    for (int64_t begin = 0; begin < width; begin += kBlockColumns) {
      const float scale = RowScale(y.data() + begin, kBlockColumns);
      for (int64_t i = begin; i < begin + kBlockColumns; ++i) {
        code_bytes[PlaceOf(row, i, row_tiles).code] = EncodeE4m3(y[i] / scale);
      }
      scale_values[PlaceOf(row, begin, row_tiles).scale] = scale;
    }
  }
  return ffi::Error::Success();
}

ffi::Error CodedGemm(ffi::AnyBuffer codes, ffi::AnyBuffer scales, ffi::AnyBuffer weight_codes,
                     ffi::AnyBuffer weight_scales, ffi::AnyBuffer global_scale,
                     ffi::Result<ffi::AnyBuffer> output, int32_t format) {
  GemmSegment segment;
  DSV4_CHECK(ParseCodedGemm(codes, scales, weight_codes, weight_scales, global_scale, *output,
                            format, segment));
  const int64_t num_rows = output->dimensions()[0];
  const int64_t row_tiles = codes.dimensions()[1], width = codes.dimensions()[0] * kBlockColumns;
  const auto* code_bytes = static_cast<const uint8_t*>(codes.untyped_data());
  const auto* scale_values = scales.typed_data<float>();
  std::vector<float> x(num_rows * width);
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t k = 0; k < width; ++k) {
      const Place place = PlaceOf(row, k, row_tiles);
      x[row * width + k] = DecodeE4m3(code_bytes[place.code]) * scale_values[place.scale];
    }
  }
  MultiplyRows(segment, x.data(), num_rows, 1, width);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_rms_norm_quantize, NormQuantize,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_coded_gemm, CodedGemm,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("format"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
