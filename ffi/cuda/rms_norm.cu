// rms_norm: a block for each row.
// Architectures: 90a 100f

#include "cache_entry.cuh"
#include "dsv4/rms_norm.h"

namespace dsv4 {
namespace {

// The sum over a block's threads; all of them call it, once.
__device__ float SumOfBlock(float x) {
  __shared__ float of_warps[32];
  const int lane = threadIdx.x % 32;
  x = SumOfLanes<32>(x);
  if (lane == 0) of_warps[threadIdx.x / 32] = x;
  __syncthreads();
  return SumOfLanes<32>(lane < blockDim.x / 32 ? of_warps[lane] : 0.0f);
}

__global__ void __launch_bounds__(kMaxRowWidth / kNormValues) NormKernel(const NormCall call) {
  const int column = threadIdx.x * kNormValues;
  const int64_t offset = blockIdx.x * int64_t{call.width} + column;
  const bool inside = column < call.width;
  uint4 loaded = {};
  float weight[kNormValues] = {}, x[kNormValues];
  if (inside) {
    loaded = *reinterpret_cast<const uint4*>(call.x + offset);
    LoadWeight(call.weight, column, weight);
  }
  UnpackBfloat16(loaded, x);
  float squares = 0.0f;
#pragma unroll
  for (float value : x) squares += value * value;
  const float scale = rsqrtf(SumOfBlock(squares) / call.width + call.eps);
  if (!inside) return;
#pragma unroll
  for (int i = 0; i < kNormValues; ++i) x[i] = x[i] * scale * weight[i];
  StoreBfloat16(reinterpret_cast<uint8_t*>(call.normalized + offset), x);
}

ffi::Error RmsNorm(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                   ffi::Result<ffi::AnyBuffer> normalized, float eps) {
  NormCall call;
  DSV4_CHECK(CheckNorm(x, weight, *normalized, eps, &call));
  if (call.num_rows == 0) return ffi::Error::Success();
  const int warps = (call.width + 32 * kNormValues - 1) / (32 * kNormValues);
  NormKernel<<<call.num_rows, 32 * warps, 0, stream>>>(call);
  return CudaStatus(cudaGetLastError());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_rms_norm, RmsNorm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
