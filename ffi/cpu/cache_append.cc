// append_swa.

#include "cache_append.h"

namespace dsv4 {
namespace {

ffi::Error AppendSwa(ffi::AnyBuffer q, ffi::AnyBuffer kv, ffi::AnyBuffer weight,
                     ffi::AnyBuffer start, ffi::AnyBuffer length, ffi::AnyBuffer frequencies,
                     ffi::RemainingArgs planes, ffi::Result<ffi::AnyBuffer> rotated_q,
                     ffi::RemainingRets results, int64_t layer, float eps) {
  AppendCall call;
  DSV4_CHECK(CheckAppend(q, kv, weight, start, length, frequencies, planes.size(), *rotated_q,
                         Buffers(results), layer, eps, &call));
  Append(call);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_append_swa, AppendSwa,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets()
                                  .Attr<int64_t>("layer")
                                  .Attr<float>("eps"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
