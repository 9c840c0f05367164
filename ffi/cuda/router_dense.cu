// Architectures: 90a
// dense_router: gate product, activation, selection and weights; of few tokens in one launch.
//
// A block multiplies a tile of experts by all tokens over a slice of the width, so that the gate
// comes through all multiprocessors, and stores the sums where the token's block looks for them.
// There are no more blocks than multiprocessors: all come to run, and none looks in vain. Every sum
// has a fixed order.

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "dsv4/ffi.h"
#include "dsv4/router.h"
#include "router_dense_many.cuh"
#include "router_launch_sm100.cuh"
#include "router_tiled_launch.cuh"

namespace dsv4 {
namespace {

constexpr int kTileTokens = 8;
constexpr int kTileExperts = 16;
constexpr int kGroup = 32;  // columns of two products
constexpr int kAlignment = 1024;  // of shared memory

// Up to 8 tokens for each of `kTokenTiles`: all warps multiply the same experts and tokens, each
// over columns of its own, `kGroups` times 32 at once.
template <int kTokenTiles_, int kGroups_, int kPerLane_, bool kFull_>
struct FewTokens {
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kGroups = kGroups_;
  static constexpr int kColumns = kWarps * kGroups * kGroup;
  static constexpr int kExperts = kTileExperts;
  static constexpr int kPerLane = kPerLane_;
  static constexpr bool kFull = kFull_;
  // Pieces of four sums that a thread looks for.
  static constexpr int kPolled = !kFull ? 5 : 2 + (kPerLane > 8);
  static constexpr bool kPrefetches = true;
  static constexpr bool kThroughShared = false;

  struct Shared {
    float4 of_warps[kWarps][kTokenTiles][kWarp];
  };
};

// c += a b for a [16, 16] and b [16, 8]; a thread brings columns of any permutation, the same in a
// and b.
__device__ __forceinline__ void Mma(float4& c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The warp's sums, over its columns of the slice.
template <typename S, typename Gate>
__device__ __forceinline__ void Multiply(const Problem& p, const Gate& gate,
                                         float4 (&acc)[S::kTokenTiles]) {
  int warp = threadIdx.x / kWarp, row = threadIdx.x % kWarp / 4;
  int first_expert = blockIdx.x * S::kExperts + row;
  int first_column = warp * S::kGroups * kGroup + threadIdx.x % 4 * 8;
  int end = min((static_cast<int>(blockIdx.y) + 1) * p.slice, p.width);
  const uint4 zero = {0, 0, 0, 0};
#pragma unroll 1
  for (int begin = blockIdx.y * p.slice; begin < end; begin += S::kColumns) {
    uint4 w[S::kGroups][2], x[S::kGroups][S::kTokenTiles];
#pragma unroll
    for (int g = 0; g < S::kGroups; ++g) {
      int column = begin + first_column + g * kGroup;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int expert = first_expert + i * 8;
        w[g][i] = column < end && expert < p.num_experts ? gate.Load8(expert, column) : zero;
      }
    }
#pragma unroll
    for (int g = 0; g < S::kGroups; ++g) {
      int column = first_column + g * kGroup;
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
        int token = row + t * kTileTokens;
        x[g][t] = zero;
        if (begin + column < end && token < p.num_tokens) {
          const auto* from = p.x + int64_t{token} * p.width + begin + column;
          x[g][t] = __ldg(reinterpret_cast<const uint4*>(from));
        }
      }
    }
#pragma unroll
    for (int g = 0; g < S::kGroups; ++g) {
      const uint4 &upper = w[g][0], &lower = w[g][1];
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
        Mma(acc[t], upper.x, lower.x, upper.y, lower.y, x[g][t].x, x[g][t].y);
        Mma(acc[t], upper.z, lower.z, upper.w, lower.w, x[g][t].z, x[g][t].w);
      }
    }
  }
}

// The sums of all warps, for the blocks that select.
template <typename S, typename Gate>
__device__ __forceinline__ void PublishFew(const Problem& p, const Gate& gate,
                                           typename S::Shared& shared) {
  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float4 acc[S::kTokenTiles] = {};
  Multiply<S>(p, gate, acc);
#pragma unroll
  for (int i = 0; i < S::kTokenTiles; ++i) shared.of_warps[warp][i][lane] = acc[i];
  Sync<kWorkers>();

  int padded_experts = gridDim.x * S::kExperts, stored_experts = p.NumQuads() * 4;
  uint32_t* sums = reinterpret_cast<uint32_t*>(arena) + p.first_sum;
  for (int i = warp; i < S::kTokenTiles; i += kWarps) {
    float4 sum = shared.of_warps[0][i][lane];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      float4 other = shared.of_warps[w][i][lane];
      sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
    }
    // Of a lane's fragment: experts lane / 4 and 8 later, tokens 2 (lane % 4) and the next.
    int token = i * kTileTokens, expert = blockIdx.x * S::kExperts + lane / 4;
    token += lane % 4 * 2;
    uint32_t* to = sums + (token * p.num_slices + blockIdx.y) * padded_experts + expert;
    uint32_t* next = to + p.num_slices * padded_experts;
    bool first_stored = expert < stored_experts, later_stored = expert + 8 < stored_experts;
    if (token < p.num_tokens && first_stored) Publish(to, Encode(sum.x));
    if (token + 1 < p.num_tokens && first_stored) Publish(next, Encode(sum.y));
    if (token < p.num_tokens && later_stored) Publish(to + 8, Encode(sum.z));
    if (token + 1 < p.num_tokens && later_stored) Publish(next + 8, Encode(sum.w));
  }
}

// What the selecting warp does for each of the block's tokens. A short launch waits longer for
// instructions than for their results, so that the warp first selects from nothing while the others
// multiply, which brings the instructions.
template <typename S>
__device__ __forceinline__ void SelectTokens(const Problem& p, int first_token, int num_blocks,
                                             TokenExperts<S::kPerLane>& experts) {
  if (first_token >= p.num_tokens) return;
  if constexpr (S::kPrefetches) {
    // By the time that the sums are looked for, their lines are in L2.
    int words = p.num_slices * gridDim.x * S::kExperts;
    const uint32_t* sums =
        reinterpret_cast<uint32_t*>(arena) + p.first_sum + first_token * words;
    for (int i = threadIdx.x % kWarp * 32; i < words; i += kWarp * 32) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(sums + i));
    }
  }
  float numbers[S::kPerLane];
#pragma unroll
  for (int i = 0; i < S::kPerLane; ++i) {
    numbers[i] = static_cast<int>(threadIdx.x % kWarp) - i * kWarp;
  }
  StoreLane(experts.numbers, numbers);
  StoreLane(experts.scores, numbers);
  __syncwarp();
  __shared__ float unused_weights[kMaxGateTopK];
  __shared__ int32_t unused_ids[kMaxGateTopK];
  float* weights = unused_weights;
  int32_t* ids = unused_ids;
#pragma unroll 1
  for (int token = first_token;; token += num_blocks) {
    LoadLane<S::kPerLane, S::kFull>(experts.numbers, p.num_experts, -Infinity(), numbers);
    RouteToken<kMaxGateTopK>(numbers, experts, p.top_k, p.scale, weights, ids);
    if (token >= p.num_tokens) break;
    Sync<kSelected>();
    Sync<kScored>();
    weights = p.weights + token * p.top_k, ids = p.ids + token * p.top_k;
  }
}

template <typename S, typename Gate>
__global__ void __launch_bounds__(kThreads + kWarp, 1) DenseRouter(Problem p, Gate gate) {
  __shared__ __align__(16) TokenExperts<S::kPerLane> experts;
  const int num_blocks = gridDim.x * gridDim.y, block = blockIdx.y * gridDim.x + blockIdx.x;
  if (threadIdx.x >= kThreads) {
    SelectTokens<S>(p, block, num_blocks, experts);
    return;
  }
  if constexpr (S::kThroughShared) {
    extern __shared__ uint8_t dynamic[];
    uint32_t past = SharedAddress(dynamic) % kAlignment;
    uint8_t* aligned = dynamic + (kAlignment - past) % kAlignment;
    S::PublishSums(p, gate, *reinterpret_cast<typename S::Shared*>(aligned));
  } else {
    __shared__ typename S::Shared shared;
    PublishFew<S>(p, gate, shared);
  }
  int padded_experts = gridDim.x * S::kExperts;
  uint32_t* sums = reinterpret_cast<uint32_t*>(arena) + p.first_sum;
  for (int token = block; token < p.num_tokens; token += num_blocks) {
    int first = threadIdx.x / p.lanes_of_quad * 4;
    float4 biases = {};
    float* bias = &biases.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bias[i] = first + i < p.num_experts ? __ldg(p.bias + first + i) : -Infinity();
    }
    uint32_t* of_token = sums + token * p.num_slices * padded_experts;
    float4 sum = Collect<S::kPolled>(p, of_token, padded_experts);
    Sync<kSelected>();
    if (threadIdx.x % p.lanes_of_quad == 0 && first < p.NumQuads() * 4) {
      float factor = gate.Scale();
      float4 scores = {SqrtSoftplus(sum.x * factor), SqrtSoftplus(sum.y * factor),
                       SqrtSoftplus(sum.z * factor), SqrtSoftplus(sum.w * factor)};
      *reinterpret_cast<float4*>(experts.scores + first) = scores;
      *reinterpret_cast<float4*>(experts.numbers + first) = {
          Biased(scores.x, biases.x), Biased(scores.y, biases.y), Biased(scores.z, biases.z),
          Biased(scores.w, biases.w)};
    }
    Sync<kScored>();
  }
}

class Ring {
 public:
  constexpr Ring(uint32_t begin, uint32_t size) : begin_(begin), size_(size) {}

  // Words of the arena that no launch has had for as long as possible.
  uint32_t Take(uint32_t num_words) {
    uint32_t next = next_.load(), first;
    do {
      first = next + num_words <= size_ ? next : 0;
    } while (!next_.compare_exchange_weak(next, first + num_words));
    return begin_ + first;
  }

 private:
  uint32_t begin_, size_;
  std::atomic<uint32_t> next_{0};
};

Ring few_words(0, kFewWords), many_words(kFewWords, kManyWords);

int NumSms() {
  int count = 0, device = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

bool IsHopper() {
  int major = 0, device = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major == 9;
}

template <typename S, typename Gate>
ffi::Error Launch(cudaStream_t stream, Problem p, const Gate& gate) {
  int num_tiles = (p.num_experts + S::kExperts - 1) / S::kExperts;
  int num_pieces = (p.width + S::kColumns - 1) / S::kColumns;
  p.lanes_of_quad = kWarp;
  while (p.lanes_of_quad * p.NumQuads() > kThreads) p.lanes_of_quad /= 2;
  int most = std::max(1, std::min(NumSms() / num_tiles, S::kPolled * p.lanes_of_quad));
  int slice_pieces = (num_pieces + most - 1) / most;
  p.slice = slice_pieces * S::kColumns;
  p.num_slices = (num_pieces + slice_pieces - 1) / slice_pieces;
  int num_words = p.num_tokens * p.num_slices * num_tiles * S::kExperts;
  p.first_sum = (S::kThroughShared ? many_words : few_words).Take(num_words);
  constexpr int kBytes = S::kThroughShared ? sizeof(typename S::Shared) + kAlignment : 0;
  // Of the current device.
  DSV4_CHECK(CudaStatus(cudaFuncSetAttribute(
      DenseRouter<S, Gate>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes)));
  DenseRouter<S><<<dim3(num_tiles, p.num_slices), kThreads + kWarp, kBytes, stream>>>(p, gate);
  return CudaStatus(cudaGetLastError());
}

template <int kPerLane, bool kFull, int kGroups, typename Gate>
ffi::Error LaunchForTokens(cudaStream_t stream, const Problem& p, const Gate& gate) {
  if (p.num_tokens <= 8) return Launch<FewTokens<1, kGroups, kPerLane, kFull>>(stream, p, gate);
  if (p.num_tokens <= 16) return Launch<FewTokens<2, kGroups, kPerLane, kFull>>(stream, p, gate);
  return Launch<ManyTokens<kGroups / 2, kPerLane, kFull>>(stream, p, gate);
}

template <typename Gate>
ffi::Error LaunchFor(cudaStream_t stream, const Problem& p, const Gate& gate) {
  if (p.num_experts == 256) return LaunchForTokens<8, true, 2>(stream, p, gate);
  if (p.num_experts == 384) return LaunchForTokens<12, true, 6>(stream, p, gate);
  return LaunchForTokens<12, false, 2>(stream, p, gate);
}

ffi::Error Impl(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer gate, ffi::AnyBuffer scales,
                ffi::AnyBuffer global_scale, ffi::AnyBuffer bias, float scale,
                ffi::Result<ffi::AnyBuffer> weights, ffi::Result<ffi::AnyBuffer> ids,
                ffi::Result<ffi::AnyBuffer> scratch) {
  DSV4_CHECK(ExpectDenseRouter(x, gate, scales, global_scale, bias, *weights, *ids, *scratch));
  Problem p = {};
  p.num_tokens = x.dimensions()[0];
  if (p.num_tokens == 0) return ffi::Error::Success();
  if (!IsHopper()) {
    if (LaunchDenseRouterSm100 == nullptr || p.num_tokens > kMaxGateTokens) {
      return ffi::Error(ffi::ErrorCode::kUnimplemented,
                        "dense_router: this library, and more than 64 tokens, are for Hopper");
    }
    return LaunchDenseRouterSm100(stream, {x, gate, scales, global_scale, bias, scale, *weights,
                                           *ids, *scratch});
  }
  p.x = static_cast<const uint16_t*>(x.untyped_data());
  p.bias = bias.typed_data<float>();
  p.width = x.dimensions()[1];
  p.num_experts = bias.element_count();
  p.top_k = ids->dimensions()[1];
  p.scale = scale;
  p.weights = weights->typed_data<float>();
  p.ids = ids->typed_data<int32_t>();
  if (p.num_tokens > kMaxGateTokens) {
    return LaunchTiledRouter(
        stream, {p.x, static_cast<const uint16_t*>(gate.untyped_data()), p.bias, p.num_tokens,
                 p.width, p.num_experts, p.top_k, p.scale, scratch->typed_data<float>(),
                 static_cast<int>(scratch->dimensions()[0]), scratch->dimensions()[2], p.weights,
                 p.ids});
  }
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
