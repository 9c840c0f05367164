// dense_router: gate product, activation, selection and weights in one launch.
//
// Clusters share the experts in tiles of 16. The eight blocks of a cluster split the width, so
// that the gate comes through E / 2 multiprocessors; their partial sums meet in distributed shared
// memory, where block r owns the r-th tile of 8 tokens. The scores of these tokens meet in device
// memory; the last of the clusters to arrive there selects. Every sum has a fixed order.

#include <cooperative_groups.h>

#include <atomic>
#include <cstdint>

#include "dsv4/ffi.h"
#include "dsv4/router.h"
#include "router.cuh"
#include "router_gate.cuh"

namespace dsv4 {
namespace {

namespace cg = cooperative_groups;

constexpr int kSplits = 8;  // blocks of a cluster
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTileTokens = 8;
constexpr int kTileExperts = 16;
constexpr int kChunk = 32;  // columns of two mma instructions
constexpr int kMaxTiles = kMaxGateTokens / kTileTokens;
static_assert(kMaxTiles == kSplits, "each block owns a tile");

// Launches take turns with the slots: the counters, zero between launches, of launches that run at
// the same time are different.
constexpr int kSlots = 64;
__device__ unsigned arrivals[kSlots][kMaxTiles];
std::atomic<unsigned> next_slot{0};

struct Problem {
  const uint16_t* x;  // [num_tokens, width] bfloat16
  const float* bias;
  int num_tokens, width, num_experts, top_k;
  float scale;
  float* scores;  // [num_tokens, num_experts]
  float* weights;
  int32_t* ids;
  int slot;
};

// c += a b for a [16, 16] and b [16, 8]; a thread brings columns of any permutation, the same in a
// and b.
__device__ __forceinline__ void Mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void Add(float4& a, float4 b) {
  a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w;
}

// Experts first_expert to + 15 times all tokens, over chunks [first, last) of the width; kChunks at
// a time, so that their loads overlap.
template <int kTiles, int kChunks, typename Gate>
__device__ __forceinline__ void Accumulate(const Problem& p, const Gate& gate, int first_expert,
                                           int first, int last, float (&acc)[kTiles][4]) {
  int row = threadIdx.x % kWarp / 4, quad = threadIdx.x % 4;
  const uint4 zero = {0, 0, 0, 0};
  for (int begin = first; begin < last; begin += kChunks) {
    uint4 w[kChunks][2];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      int column = (begin + i) * kChunk + quad * 8;
      bool inside = begin + i < last && column < p.width;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int expert = first_expert + half * 8 + row;
        w[i][half] = inside && expert < p.num_experts ? gate.Load8(expert, column) : zero;
      }
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      int column = (begin + i) * kChunk + quad * 8;
      bool inside = begin + i < last && column < p.width;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        int64_t token = t * kTileTokens + row;
        uint4 x = zero;
        if (inside && token < p.num_tokens) {
          x = __ldg(reinterpret_cast<const uint4*>(p.x + token * p.width + column));
        }
        Mma(acc[t], w[i][0].x, w[i][1].x, w[i][0].y, w[i][1].y, x.x, x.y);
        Mma(acc[t], w[i][0].z, w[i][1].z, w[i][0].w, w[i][1].w, x.z, x.w);
      }
    }
  }
}

template <int kTiles, int kPerLane, bool kFull, typename Gate>
__global__ void __cluster_dims__(kSplits) __launch_bounds__(kThreads, 2)
    DenseRouter(Problem p, Gate gate) {
  constexpr int kSums = kWarps * kTiles * kWarp, kScores = kTileTokens * kWarp * kPerLane / 4;
  // First the warps' sums [kWarps, kTiles, kWarp], then tokens' scores.
  __shared__ float4 shared[kSums > kScores ? kSums : kScores];
  __shared__ float4 of_splits[kSplits][kWarp];
  __shared__ bool is_last;
  auto cluster = cg::this_cluster();
  cluster.barrier_arrive();

  int split = blockIdx.x, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int first_expert = blockIdx.y * kTileExperts;
  int num_chunks = (p.width + kChunk - 1) / kChunk;
  int per_warp = (num_chunks + kSplits * kWarps - 1) / (kSplits * kWarps);
  int first = (split * kWarps + warp) * per_warp;
  float acc[kTiles][4] = {};
  Accumulate<kTiles, kPerLane == 8 ? 2 : 4>(p, gate, first_expert, first,
                                            min(first + per_warp, num_chunks), acc);
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    shared[(warp * kTiles + t) * kWarp + lane] = {acc[t][0], acc[t][1], acc[t][2], acc[t][3]};
  }
  __syncthreads();

  // Every block of the cluster must run before its memory is written.
  cluster.barrier_wait();
  if (warp < kTiles) {
    float4 sum = shared[threadIdx.x];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) Add(sum, shared[w * kTiles * kWarp + threadIdx.x]);
    cluster.map_shared_rank(&of_splits[split][0], warp)[lane] = sum;
  }
  cluster.sync();
  int first_token = split * kTileTokens;
  if (split >= kTiles || first_token >= p.num_tokens) return;

  if (threadIdx.x < kTileTokens * kTileExperts) {
    float logit = 0.0f;
    const float* partial = &of_splits[0][0].x;
#pragma unroll
    for (int s = 0; s < kSplits; ++s) logit += partial[s * 4 * kWarp + threadIdx.x];
    // Element c of lane l's fragment: expert l / 4 + 8 (c / 2), token 2 (l % 4) + c % 2.
    int l = threadIdx.x / 4, c = threadIdx.x % 4;
    int expert = first_expert + l / 4 + 8 * (c / 2), token = first_token + 2 * (l % 4) + c % 2;
    if (expert < p.num_experts && token < p.num_tokens) {
      p.scores[token * p.num_experts + expert] = SqrtSoftplus(logit * gate.Scale());
    }
  }
  int64_t token = first_token + warp;
  float scores[kPerLane], biases[kPerLane];
  LoadLane<kPerLane, kFull>(p.bias, p.num_experts, biases);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    unsigned others = gridDim.y - 1;
    is_last = atomicInc(&arrivals[p.slot][split], others) == others;
    __threadfence();
  }
  __syncthreads();
  if (!is_last || token >= p.num_tokens) return;
  LoadLane<kPerLane, kFull>(p.scores + token * p.num_experts, p.num_experts, scores);
  auto* mine = reinterpret_cast<float*>(shared) + warp * kWarp * kPerLane;
  RouteToken<kMaxGateTopK>(scores, biases, p.num_experts, p.top_k, p.scale, mine,
                           p.weights + token * p.top_k, p.ids + token * p.top_k);
}

template <int kTiles, typename Gate>
void Launch(cudaStream_t stream, const Problem& p, const Gate& gate) {
  dim3 grid(kSplits, (p.num_experts + kTileExperts - 1) / kTileExperts);
  auto* kernel = p.num_experts == 256   ? DenseRouter<kTiles, 8, true, Gate>
                 : p.num_experts == 384 ? DenseRouter<kTiles, 12, true, Gate>
                                        : DenseRouter<kTiles, 12, false, Gate>;
  kernel<<<grid, kThreads, 0, stream>>>(p, gate);
}

template <typename Gate>
ffi::Error LaunchFor(cudaStream_t stream, const Problem& p, const Gate& gate) {
  if (p.num_tokens <= kTileTokens) {
    Launch<1>(stream, p, gate);
  } else if (p.num_tokens <= 2 * kTileTokens) {
    Launch<2>(stream, p, gate);
  } else {
    Launch<kMaxTiles>(stream, p, gate);
  }
  return CudaStatus(cudaGetLastError());
}

ffi::Error Impl(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer gate, ffi::AnyBuffer scales,
                ffi::AnyBuffer global_scale, ffi::AnyBuffer bias, float scale,
                ffi::Result<ffi::AnyBuffer> weights, ffi::Result<ffi::AnyBuffer> ids,
                ffi::Result<ffi::AnyBuffer> scores) {
  DSV4_CHECK(ExpectDenseRouter(x, gate, scales, global_scale, bias, *weights, *ids, *scores));
  Problem p = {};
  p.num_tokens = x.dimensions()[0];
  if (p.num_tokens == 0) return ffi::Error::Success();
  p.x = static_cast<const uint16_t*>(x.untyped_data());
  p.bias = bias.typed_data<float>();
  p.width = x.dimensions()[1];
  p.num_experts = bias.element_count();
  p.top_k = ids->dimensions()[1];
  p.scale = scale;
  p.scores = scores->typed_data<float>();
  p.weights = weights->typed_data<float>();
  p.ids = ids->typed_data<int32_t>();
  p.slot = next_slot.fetch_add(1) % kSlots;
  if (gate.element_type() == ffi::DataType::BF16) {
    return LaunchFor(stream, p,
                     Bfloat16Gate{static_cast<const uint16_t*>(gate.untyped_data()), p.width});
  }
  return LaunchFor(stream, p,
                   Nvfp4Gate{gate.typed_data<uint8_t>(),
                             static_cast<const uint8_t*>(scales.untyped_data()),
                             global_scale.typed_data<float>(), p.width});
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_dense_router, Impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
