// sparse_attention: every query, head and slot, one after the other.

#include "dsv4/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace dsv4 {
namespace {

void DecodeRecord(const Attention& a, const Location& at, float* entry) {
  const int plain = a.width - a.rotary_width;
  for (int i = 0; i < plain; ++i) {
    entry[i] = DecodeE4m3(at.body[i]) * DecodeE8m0(at.scales[i / kGroupChannels]);
  }
  for (int i = 0; i < a.rotary_width; ++i) {
    const uint8_t* bytes = at.body + plain + 2 * i;
    entry[plain + i] = FromBfloat16(static_cast<uint16_t>(bytes[0] | bytes[1] << 8));
  }
}

// One head's query [c] over entries [n, c] to its output, before rotation.
void AttendHead(const Attention& a, const std::vector<float>& entries, const float* q, float sink,
                bool round_to_bfloat16, float* o) {
  const int64_t c = a.width, n = static_cast<int64_t>(entries.size()) / c;
  std::vector<float> weights(n);
  float peak = sink;
  for (int64_t i = 0; i < n; ++i) {
    float dot = 0.0f;
    for (int64_t j = 0; j < c; ++j) dot += q[j] * entries[i * c + j];
    weights[i] = dot * a.scale;
    peak = std::max(peak, weights[i]);
  }
  std::fill(o, o + c, 0.0f);
  if (n == 0) return;
  float total = std::exp(sink - peak);
  for (int64_t i = 0; i < n; ++i) {
    float weight = std::exp(weights[i] - peak);
    total += weight;
    if (round_to_bfloat16) weight = FromBfloat16(ToBfloat16(weight));
    for (int64_t j = 0; j < c; ++j) o[j] += weight * entries[i * c + j];
  }
  for (int64_t j = 0; j < c; ++j) o[j] /= total;
}

// By minus the query's position; before that rounded as the output is.
void RotateBack(const Attention& a, int position, bool round_to_bfloat16, float* o) {
  float* pair = o + a.width - a.rotary_width;
  for (int i = 0; i < a.rotary_width / 2; ++i, pair += 2) {
    if (round_to_bfloat16) {
      for (int j = 0; j < 2; ++j) pair[j] = FromBfloat16(ToBfloat16(pair[j]));
    }
    const float angle = static_cast<float>(position) * a.frequencies[i];
    const float cos = std::cos(angle), sin = std::sin(angle);
    const float even = pair[0] * cos + pair[1] * sin, odd = pair[1] * cos - pair[0] * sin;
    pair[0] = even;
    pair[1] = odd;
  }
}

ffi::Error SparseAttention(ffi::AnyBuffer q, ffi::AnyBuffer sink, ffi::AnyBuffer frequencies,
                           ffi::AnyBuffer ring, ffi::AnyBuffer ring_scales, ffi::AnyBuffer recent,
                           ffi::AnyBuffer recent_scales, ffi::AnyBuffer pool,
                           ffi::AnyBuffer pool_scales, ffi::AnyBuffer block_table,
                           ffi::AnyBuffer ids, ffi::AnyBuffer start, ffi::AnyBuffer length,
                           ffi::Result<ffi::AnyBuffer> o, ffi::Result<ffi::AnyBuffer>,
                           ffi::Result<ffi::AnyBuffer>, int64_t layer, int64_t pool_layer,
                           int64_t window, int64_t ratio, float scale, int64_t, int64_t, int64_t) {
  Attention a;
  DSV4_CHECK(CheckAttention({q, sink, frequencies, ring, ring_scales, recent, recent_scales, pool,
                             pool_scales, block_table, ids, start, length, layer, pool_layer,
                             window, ratio, scale},
                            *o, &a));
  const bool bfloat16 = q.element_type() == ffi::DataType::BF16;
  const int64_t c = a.width;
  std::vector<float> entries, head_q(c), head_o(c);
  for (int row = 0; row < a.num_queries; ++row) {
    const Query query = QueryOf(a, row);
    entries.clear();
    for (int slot = 0; slot < query.num_slots; ++slot) {
      Search search = FindSlot(a, query, slot);
      FindBlock(a, &search);
      const Location at = Found(a, search);
      if (at.body == nullptr) continue;
      entries.resize(entries.size() + c);
      DecodeRecord(a, at, entries.data() + entries.size() - c);
    }
    for (int64_t head = 0; head < a.heads; ++head) {
      const int64_t first = (int64_t{row} * a.heads + head) * c;
      for (int64_t j = 0; j < c; ++j) {
        head_q[j] = bfloat16 ? FromBfloat16(static_cast<const uint16_t*>(a.q)[first + j])
                             : static_cast<const float*>(a.q)[first + j];
      }
      AttendHead(a, entries, head_q.data(), a.sink[head], bfloat16, head_o.data());
      RotateBack(a, query.position, bfloat16, head_o.data());
      for (int64_t j = 0; j < c; ++j) {
        if (bfloat16) {
          static_cast<uint16_t*>(o->untyped_data())[first + j] = ToBfloat16(head_o[j]);
        } else {
          o->typed_data<float>()[first + j] = head_o[j];
        }
      }
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_sparse_attention, SparseAttention,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("layer")
                                  .Attr<int64_t>("pool_layer")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("ratio")
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("heads_each")
                                  .Attr<int64_t>("max_splits")
                                  .Attr<int64_t>("min_blocks"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
