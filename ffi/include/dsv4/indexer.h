// The arguments of indexer_scores, and the formats in which indexer keys are kept.
#pragma once

#include <cstdint>

#include "dsv4/ffi.h"

namespace dsv4 {

// Planes of a key of c channels:
//   kMxfp4: c / 2 bytes of E2M1 pairs, c / 32 bytes of E8M0 scales
//   kFp8:   c E4M3 values, one float32 scale
//   kNvfp4: c / 2 bytes of E2M1 pairs, c / 16 E4M3 scales
enum class KeyFormat { kMxfp4, kFp8, kNvfp4 };

struct IndexerSizes {
  int64_t batch, num_tokens, num_heads, width;
  int64_t num_blocks, per_block, table_width;
  KeyFormat format;

  int64_t capacity() const { return table_width * per_block; }
};

// q [b, t, h, c], weights [b, t, h], codes [l, n, e, .], scales [l, n, e, .], block_table [b, m],
// lengths [b, t], scores [b, t, m * e].
inline ffi::Error CheckIndexerScores(const ffi::AnyBuffer& q, const ffi::AnyBuffer& weights,
                                     const ffi::AnyBuffer& codes, const ffi::AnyBuffer& scales,
                                     const ffi::AnyBuffer& block_table,
                                     const ffi::AnyBuffer& lengths, int64_t layer,
                                     const ffi::AnyBuffer& scores, IndexerSizes* sizes) {
  using ffi::DataType;
  DSV4_CHECK(ExpectShape("q", q, {kAnySize, kAnySize, kAnySize, kAnySize}));
  DSV4_CHECK(ExpectDtype("q", q, {DataType::BF16, DataType::F8E4M3FN, DataType::F32}));
  const int64_t b = q.dimensions()[0], t = q.dimensions()[1];
  const int64_t h = q.dimensions()[2], c = q.dimensions()[3];
  DSV4_CHECK(ExpectMultiple("q's width", c, 32));
  DSV4_CHECK(Expect("weights", weights, DataType::F32, {b, t, h}));
  DSV4_CHECK(Expect("lengths", lengths, DataType::S32, {b, t}));
  DSV4_CHECK(Expect("block_table", block_table, DataType::S32, {b, kAnySize}));
  DSV4_CHECK(ExpectDtype("codes", codes, {DataType::U8, DataType::F8E4M3FN}));
  DSV4_CHECK(ExpectDtype("scales", scales, {DataType::U8, DataType::F32, DataType::F8E4M3FN}));
  const bool fp8 = codes.element_type() == DataType::F8E4M3FN;
  const bool mxfp4 = scales.element_type() == DataType::U8;
  const KeyFormat format = fp8 ? KeyFormat::kFp8 : mxfp4 ? KeyFormat::kMxfp4 : KeyFormat::kNvfp4;
  DSV4_CHECK(ExpectShape("codes", codes, {kAnySize, kAnySize, kAnySize, fp8 ? c : c / 2}));
  const int64_t layers = codes.dimensions()[0], n = codes.dimensions()[1];
  const int64_t e = codes.dimensions()[2], m = block_table.dimensions()[1];
  const int64_t groups = fp8 ? 1 : mxfp4 ? c / 32 : c / 16;
  const DataType scale_type = fp8 ? DataType::F32 : mxfp4 ? DataType::U8 : DataType::F8E4M3FN;
  DSV4_CHECK(Expect("scales", scales, scale_type, {layers, n, e, groups}));
  if (layer < 0 || layer >= layers) {
    return Invalid("layer", std::to_string(layer), "0 to " + std::to_string(layers - 1));
  }
  DSV4_CHECK(Expect("scores", scores, DataType::F32, {b, t, m * e}));
  *sizes = {b, t, h, c, n, e, m, format};
  return ffi::Error::Success();
}

}  // namespace dsv4
