// timestamp: a steady clock in nanoseconds, low word first. Benchmarks bracket work with it.
// The operand is an earlier reading: it makes the call depend on what came before.

#include <chrono>

#include "dsv4/ffi.h"

namespace dsv4 {
namespace {

ffi::Error Timestamp(ffi::AnyBuffer earlier, ffi::Result<ffi::AnyBuffer> nanoseconds) {
  DSV4_CHECK(Expect("earlier", earlier, ffi::DataType::U32, {2}));
  DSV4_CHECK(Expect("nanoseconds", *nanoseconds, ffi::DataType::U32, {2}));
  auto since_start = std::chrono::steady_clock::now().time_since_epoch();
  uint64_t now = std::chrono::duration_cast<std::chrono::nanoseconds>(since_start).count();
  auto* words = nanoseconds->typed_data<uint32_t>();
  words[0] = static_cast<uint32_t>(now);
  words[1] = static_cast<uint32_t>(now >> 32);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_timestamp, Timestamp,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
