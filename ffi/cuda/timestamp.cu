// timestamp: the device's clock in nanoseconds, low word first. Benchmarks bracket work with it.
// The operand is an earlier reading: it makes the call depend on what came before.
// Architectures: 90a 100f

#include "dsv4/ffi.h"

namespace dsv4 {
namespace {

__global__ void TimestampKernel(uint2* nanoseconds) {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  *nanoseconds = make_uint2(static_cast<uint32_t>(now), static_cast<uint32_t>(now >> 32));
}

ffi::Error Timestamp(cudaStream_t stream, ffi::AnyBuffer earlier,
                     ffi::Result<ffi::AnyBuffer> nanoseconds) {
  DSV4_CHECK(Expect("earlier", earlier, ffi::DataType::U32, {2}));
  DSV4_CHECK(Expect("nanoseconds", *nanoseconds, ffi::DataType::U32, {2}));
  TimestampKernel<<<1, 1, 0, stream>>>(static_cast<uint2*>(nanoseconds->untyped_data()));
  return CudaStatus(cudaGetLastError());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_timestamp, Timestamp,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
