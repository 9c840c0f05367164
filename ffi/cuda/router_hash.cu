// hash_router: experts from a table, weights from the gate's rows of these experts alone. One block
// a token, two warps an expert.

#include "dsv4/ffi.h"
#include "dsv4/router.h"
#include "router.cuh"
#include "router_gate.cuh"

namespace dsv4 {
namespace {

constexpr int kHalves = 2;

struct Problem {
  const uint16_t* x;         // [num_tokens, width] bfloat16
  const int32_t* token_ids;  // [num_tokens]
  const int32_t* table;      // [vocabulary, top_k]
  int width, vocabulary, top_k;
  float scale;
  float* weights;
  int32_t* ids;
};

__device__ __forceinline__ float Dot(uint4 a, uint4 b) {
  const uint32_t* pair_a = &a.x;
  const uint32_t* pair_b = &b.x;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(__uint_as_float(pair_a[i] << 16), __uint_as_float(pair_b[i] << 16), sum);
    sum = fmaf(__uint_as_float(pair_a[i] & 0xffff0000u), __uint_as_float(pair_b[i] & 0xffff0000u),
               sum);
  }
  return sum;
}

template <typename Gate>
__global__ void __launch_bounds__(kHalves * kMaxTopK * kWarp, 1)
    HashRouter(Problem p, Gate gate) {
  __shared__ float logits[kMaxTopK][kHalves];
  int64_t token = blockIdx.x;
  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int rank = warp / kHalves, half = warp % kHalves;
  int token_id = p.token_ids[token];
  bool known = 0 <= token_id && token_id < p.vocabulary;
  if (known) {
    int expert = p.table[int64_t{token_id} * p.top_k + rank];
    const uint16_t* x = p.x + token * p.width;
    float sum = 0.0f;
#pragma unroll 4
    for (int column = (half * kWarp + lane) * 8; column < p.width; column += kHalves * kWarp * 8) {
      sum += Dot(__ldg(reinterpret_cast<const uint4*>(x + column)), gate.Load8(expert, column));
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, offset);
    }
    if (lane == 0) logits[rank][half] = sum;
  }
  __syncthreads();
  if (warp > 0) return;
  float score = 0.0f;
  int expert = -1;
  if (known && lane < p.top_k) {
    expert = p.table[int64_t{token_id} * p.top_k + lane];
    score = SqrtSoftplus((logits[lane][0] + logits[lane][1]) * gate.Scale());
  }
  StoreRoute<kMaxTopK>(expert, score, p.top_k, p.scale, p.weights + token * p.top_k,
                       p.ids + token * p.top_k);
}

ffi::Error Impl(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer gate, ffi::AnyBuffer scales,
                ffi::AnyBuffer global_scale, ffi::AnyBuffer token_ids,
                ffi::AnyBuffer table, float scale, ffi::Result<ffi::AnyBuffer> weights,
                ffi::Result<ffi::AnyBuffer> ids) {
  DSV4_CHECK(ExpectHashRouter(x, gate, scales, global_scale, token_ids, table, *weights, *ids));
  int64_t num_tokens = x.dimensions()[0], top_k = ids->dimensions()[1];
  if (num_tokens == 0) return ffi::Error::Success();
  Problem p = {};
  p.x = static_cast<const uint16_t*>(x.untyped_data());
  p.token_ids = token_ids.typed_data<int32_t>();
  p.table = table.typed_data<int32_t>();
  p.width = x.dimensions()[1];
  p.vocabulary = table.dimensions()[0];
  p.top_k = top_k;
  p.scale = scale;
  p.weights = weights->typed_data<float>();
  p.ids = ids->typed_data<int32_t>();
  int threads = kHalves * top_k * kWarp;
  if (gate.element_type() == ffi::DataType::BF16) {
    Bfloat16Gate rows = {static_cast<const uint16_t*>(gate.untyped_data()), p.width};
    HashRouter<<<num_tokens, threads, 0, stream>>>(p, rows);
  } else {
    Nvfp4Gate rows = {static_cast<const uint8_t*>(gate.untyped_data()),
                      static_cast<const uint8_t*>(scales.untyped_data()),
                      global_scale.typed_data<float>(), p.width};
    HashRouter<<<num_tokens, threads, 0, stream>>>(p, rows);
  }
  return CudaStatus(cudaGetLastError());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_hash_router, Impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
