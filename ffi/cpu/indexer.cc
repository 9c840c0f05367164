// indexer_scores: every entry of every query, one after the other.

#include "dsv4/indexer.h"

#include <algorithm>
#include <vector>

#include "dsv4/formats.h"

namespace dsv4 {
namespace {

float Element(const ffi::AnyBuffer& x, int64_t i) {
  switch (x.element_type()) {
    case ffi::DataType::F32:
      return static_cast<const float*>(x.untyped_data())[i];
    case ffi::DataType::BF16:
      return FromBfloat16(static_cast<const uint16_t*>(x.untyped_data())[i]);
    default:
      return DecodeE4m3(static_cast<const uint8_t*>(x.untyped_data())[i]);
  }
}

void DecodeKey(const IndexerSizes& sizes, const ffi::AnyBuffer& codes,
               const ffi::AnyBuffer& scales, int64_t entry, std::vector<float>& key) {
  const auto* bytes = static_cast<const uint8_t*>(codes.untyped_data());
  const auto* scale_bytes = static_cast<const uint8_t*>(scales.untyped_data());
  const int64_t c = sizes.width;
  for (int64_t i = 0; i < c; ++i) {
    if (sizes.format == KeyFormat::kFp8) {
      key[i] = DecodeE4m3(bytes[entry * c + i]) * Element(scales, entry);
      continue;
    }
    const float value = DecodeE2m1(bytes[(entry * c + i) / 2] >> (i % 2 * 4) & 15u);
    key[i] = sizes.format == KeyFormat::kMxfp4
                 ? value * DecodeE8m0(scale_bytes[(entry * c + i) / 32])
                 : value * DecodeE4m3(scale_bytes[(entry * c + i) / 16]);
  }
}

ffi::Error IndexerScores(ffi::AnyBuffer q, ffi::AnyBuffer weights, ffi::AnyBuffer codes,
                         ffi::AnyBuffer scales, ffi::AnyBuffer block_table,
                         ffi::AnyBuffer lengths, ffi::Result<ffi::AnyBuffer> scores,
                         int64_t layer, int64_t min_length) {
  IndexerSizes sizes;
  DSV4_CHECK(CheckIndexerScores(q, weights, codes, scales, block_table, lengths, layer, *scores,
                                &sizes));
  const int64_t h = sizes.num_heads, c = sizes.width;
  std::vector<float> key(c), queries(h * c);
  for (int64_t row = 0; row < sizes.batch * sizes.num_tokens; ++row) {
    const int64_t length =
        std::min<int64_t>(lengths.typed_data<int32_t>()[row], sizes.capacity());
    if (length <= min_length) continue;
    const int32_t* table =
        block_table.typed_data<int32_t>() + row / sizes.num_tokens * sizes.table_width;
    for (int64_t i = 0; i < h * c; ++i) queries[i] = Element(q, row * h * c + i);
    for (int64_t i = 0; i < length; ++i) {
      const int64_t block = std::max(table[i / sizes.per_block], 0);
      DecodeKey(sizes, codes, scales,
                (layer * sizes.num_blocks + block) * sizes.per_block + i % sizes.per_block, key);
      float score = 0.0f;
      for (int64_t head = 0; head < h; ++head) {
        float dot = 0.0f;
        for (int64_t j = 0; j < c; ++j) dot += queries[head * c + j] * key[j];
        const float relu = dot < 0.0f ? 0.0f : dot;  // NaN stays
        score += weights.typed_data<float>()[row * h + head] * relu;
      }
      scores->typed_data<float>()[row * sizes.capacity() + i] = score;
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_indexer_scores, IndexerScores,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("layer")
                                  .Attr<int64_t>("min_length"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
