// The arguments of gather_kv.
#pragma once

#include <vector>

#include "dsv4/cache.h"

namespace dsv4 {

// Operands block_table [b, m], ids [b, ...], then planes [l, n, e, .]; result [b, ..., c].
struct GatherCall {
  const int32_t* block_table;
  const int32_t* ids;
  uint16_t* out;
  EntryPlanes pool;
  int64_t num_entries, layer;
  int32_t per_sequence, table_width, num_blocks, per_block;
};

inline ffi::Error CheckGather(ffi::AnyBuffer block_table, ffi::AnyBuffer ids,
                              ffi::RemainingArgs operands, ffi::AnyBuffer out, int64_t layer,
                              GatherCall* call) {
  using ffi::DataType;
  DSV4_CHECK(Expect("block_table", block_table, DataType::S32, {kAnySize, kAnySize}));
  DSV4_CHECK(ExpectDtype("ids", ids, {DataType::S32}));
  DSV4_CHECK(ExpectDtype("out", out, {DataType::BF16}));
  const int64_t b = block_table.dimensions()[0], n = static_cast<int64_t>(ids.element_count());
  if (ids.dimensions().size() == 0 || ids.dimensions()[0] != b) {
    return Invalid("ids", ShapeText(ids.dimensions()), std::to_string(b) + " sequences");
  }
  if (static_cast<int64_t>(out.element_count()) != n * kHeadDim) {
    return Invalid("out", ShapeText(out.dimensions()), std::to_string(n) + " entries");
  }
  std::vector<ffi::AnyBuffer> planes;
  for (size_t i = 0; i < operands.size(); ++i) {
    planes.push_back(operands.get<ffi::AnyBuffer>(i).value());
  }
  DSV4_CHECK(CheckPlanes("pool", planes, {kAnySize, kAnySize, kAnySize}, kHeadDim, &call->pool));
  DSV4_CHECK(CheckLayer(layer, planes[0].dimensions()[0]));
  DSV4_CHECK(ExpectAligned("out", out, 16));
  call->block_table = block_table.typed_data<int32_t>();
  call->ids = ids.typed_data<int32_t>();
  call->out = static_cast<uint16_t*>(out.untyped_data());
  call->num_entries = n;
  call->layer = layer;
  call->per_sequence = static_cast<int32_t>(b == 0 ? 0 : n / b);
  call->table_width = static_cast<int32_t>(block_table.dimensions()[1]);
  call->num_blocks = static_cast<int32_t>(planes[0].dimensions()[1]);
  call->per_block = static_cast<int32_t>(planes[0].dimensions()[2]);
  return ffi::Error::Success();
}

}  // namespace dsv4
