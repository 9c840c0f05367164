// rms_norm_quantize: a row's root-mean-square norm, and its E4M3 codes in the tiles of products
// with many rows.
// Architectures: 90a 100f

#include "dsv4/coded_inputs.h"
#include "gemm_input.cuh"

namespace dsv4 {
namespace {

struct NormParams {
  const uint16_t* x;
  const float* weight;
  uint16_t* normalized;
  uint8_t* codes;
  float* scales;
  int32_t num_rows, width, row_tiles;
  float eps;
};

constexpr int kMaxThreads = kMaxNormWidth / 8;

// A block to a row, eight values to a thread; rows beyond the last become zeros.
__global__ void __launch_bounds__(kMaxThreads) QuantizeNormalizedRow(const NormParams p) {
  __shared__ float squares_of_warp[kMaxThreads / 32];
  const int column = threadIdx.x * 8, lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x, offset = row * p.width + column;
  const bool inside = column < p.width, filled = inside && row < p.num_rows;
  uint4 words = {};
  if (filled) words = __ldg(reinterpret_cast<const uint4*>(p.x + offset));
  uint32_t(&pairs)[4] = reinterpret_cast<uint32_t(&)[4]>(words);
  float values[8], squares = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    values[i] = __uint_as_float(i % 2 ? pairs[i / 2] & 0xffff0000u : pairs[i / 2] << 16);
    squares += values[i] * values[i];
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, distance);
  }
  if (lane == 0) squares_of_warp[threadIdx.x / 32] = squares;
  __syncthreads();
  squares = lane < blockDim.x / 32 ? squares_of_warp[lane] : 0;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, distance);
  }
  const float scale = rsqrtf(squares / p.width + p.eps);
  if (filled) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const float4 weight = __ldg(reinterpret_cast<const float4*>(p.weight + column + i));
      pairs[i / 2] = ToBfloat16(values[i] * scale * weight.x) |
                     uint32_t{ToBfloat16(values[i + 1] * scale * weight.y)} << 16;
      pairs[i / 2 + 1] = ToBfloat16(values[i + 2] * scale * weight.z) |
                         uint32_t{ToBfloat16(values[i + 3] * scale * weight.w)} << 16;
    }
    *reinterpret_cast<uint4*>(p.normalized + offset) = words;
  }
  StoreCodes({words, column / kBlockColumns, static_cast<int>(blockIdx.x), lane % 16},
             ScaleOfShare(words), p.row_tiles, inside, p.codes, p.scales);
}

ffi::Error NormQuantize(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                        ffi::Result<ffi::AnyBuffer> normalized, ffi::Result<ffi::AnyBuffer> codes,
                        ffi::Result<ffi::AnyBuffer> scales, float eps) {
  DSV4_CHECK(CheckNormQuantize(x, weight, *normalized, *codes, *scales));
  NormParams params;
  params.x = static_cast<const uint16_t*>(x.untyped_data());
  params.weight = weight.typed_data<float>();
  params.normalized = static_cast<uint16_t*>(normalized->untyped_data());
  params.codes = static_cast<uint8_t*>(codes->untyped_data());
  params.scales = scales->typed_data<float>();
  params.num_rows = static_cast<int32_t>(x.dimensions()[0]);
  params.width = static_cast<int32_t>(x.dimensions()[1]);
  params.row_tiles = CeilDiv(params.num_rows, kInputTileRows);
  params.eps = eps;
  if (params.num_rows == 0) return ffi::Error::Success();
  const int threads = CeilDiv(params.width, 256) * 32;
  QuantizeNormalizedRow<<<params.row_tiles * kInputTileRows, threads, 0, stream>>>(params);
  return CudaStatus(cudaGetLastError());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_rms_norm_quantize, NormQuantize,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("eps"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
