// gather_kv: one entry after the other.

#include "cache_entry.h"
#include "dsv4/cache_gather.h"

namespace dsv4 {
namespace {

ffi::Error GatherKv(ffi::AnyBuffer block_table, ffi::AnyBuffer ids, ffi::RemainingArgs planes,
                    ffi::Result<ffi::AnyBuffer> out, int64_t layer) {
  GatherCall call;
  DSV4_CHECK(CheckGather(block_table, ids, planes, *out, layer, &call));
  for (int64_t i = 0; i < call.num_entries; ++i) {
    const int32_t* blocks = call.block_table + i / call.per_sequence * call.table_width;
    const int64_t row = EntryRow(blocks, call.table_width, call.layer, call.num_blocks,
                                 call.per_block, call.ids[i]);
    uint16_t* target = call.out + i * kHeadDim;
    if (row < 0) {
      std::fill_n(target, kHeadDim, uint16_t{0});
    } else {
      DecodeEntry(call.pool, row, target);
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_gather_kv, GatherKv,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("layer"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
