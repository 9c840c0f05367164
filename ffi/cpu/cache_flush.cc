// flush_csa and flush_hca.

#include "cache_flush.h"

namespace dsv4 {
namespace {

ffi::Error HandleCsa(ffi::AnyBuffer block_table, ffi::AnyBuffer start, ffi::AnyBuffer length,
                    ffi::AnyBuffer frequencies, ffi::RemainingArgs operands,
                    ffi::RemainingRets results, int64_t layer, float eps) {
  FlushCall call;
  DSV4_CHECK(CheckFlush(block_table, start, length, frequencies, Buffers(operands),
                        Buffers(results), layer, eps, {kHeadDim, kKeyDim}, true, &call));
  FlushCsa(call);
  return ffi::Error::Success();
}

ffi::Error HandleHca(ffi::AnyBuffer block_table, ffi::AnyBuffer start, ffi::AnyBuffer length,
                    ffi::AnyBuffer frequencies, ffi::RemainingArgs operands,
                    ffi::RemainingRets results, int64_t layer, float eps) {
  FlushCall call;
  DSV4_CHECK(CheckFlush(block_table, start, length, frequencies, Buffers(operands),
                        Buffers(results), layer, eps, {kHeadDim}, false, &call));
  FlushHca(call);
  return ffi::Error::Success();
}

}  // namespace

#define DSV4_FLUSH_BINDING               \
  ffi::Ffi::Bind()                       \
      .Arg<ffi::AnyBuffer>()             \
      .Arg<ffi::AnyBuffer>()             \
      .Arg<ffi::AnyBuffer>()             \
      .Arg<ffi::AnyBuffer>()             \
      .RemainingArgs()                   \
      .RemainingRets()                   \
      .Attr<int64_t>("layer")            \
      .Attr<float>("eps")

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_flush_csa, HandleCsa, DSV4_FLUSH_BINDING,
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_flush_hca, HandleHca, DSV4_FLUSH_BINDING,
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
