// Architectures: 90a
// dense_router: gate product, activation, selection and weights in one launch.
//
// A block multiplies a tile of experts by all tokens over a slice of the width, so that the gate
// comes through all multiprocessors, and stores the sums where the token's block looks for them. A
// stored word is never zero; who has read it stores zero for the next launch. There are no more
// blocks than multiprocessors: all come to run, and none looks in vain. Every sum has a fixed
// order.

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "dsv4/ffi.h"
#include "dsv4/router.h"
#include "mbarrier.cuh"
#include "router.cuh"
#include "router_gate.cuh"
#include "router_launch_sm100.cuh"

namespace dsv4 {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTileTokens = 8;
constexpr int kTileExperts = 16;
constexpr int kGroup = 32;  // columns of two products

// Zero between launches. Launches take turns with pieces of it, so that those that run at the same
// time have different ones.
constexpr uint32_t kArenaWords = 1 << 23;
__device__ uint4 arena[kArenaWords / 4];
std::atomic<uint32_t> next_words{0};

struct Problem {
  const uint16_t* x;  // [num_tokens, width] bfloat16
  const float* bias;
  int num_tokens, width, num_experts, top_k;
  float scale;
  int slice, num_slices;  // columns
  int lanes_of_quad;      // threads that add up four experts
  uint32_t first_sum;     // in the arena: [num_tokens, num_slices, padded experts]
  float* weights;
  int32_t* ids;

  __host__ __device__ int NumQuads() const { return (num_experts + 3) / 4; }
};

// How the warps share the tiles of experts and tokens and the columns of a slice.
template <int kExpertTiles_, int kTokenTiles_, int kTokenWarps_, int kGroups_, int kPerLane_,
          bool kFull_>
struct Shape {
  static constexpr int kExpertTiles = kExpertTiles_;  // of each warp
  static constexpr int kTokenWarps = kTokenWarps_;
  static constexpr int kTokenTiles = kTokenTiles_ / kTokenWarps;  // of each warp
  static constexpr int kColumnWarps = kWarps / kTokenWarps;
  static constexpr int kGroups = kGroups_;  // of a warp, at a time
  static constexpr int kColumns = kColumnWarps * kGroups * kGroup;
  static constexpr int kFragments = kExpertTiles * kTokenTiles;
  static constexpr int kExperts = kExpertTiles * kTileExperts;
  // Many tokens go through shared memory, so that the loads of the gate have the registers.
  static constexpr bool kStaged = kTokenTiles * kTokenWarps > 2;
  static constexpr int kTokens = kTokenTiles * kTokenWarps * kTileTokens;
  static constexpr int kStagedTokens = kStaged ? kTokens : 1;
  static constexpr int kPitch = kColumns + kGroup;  // without bank conflicts
  static constexpr int kPerLane = kPerLane_;
  static constexpr bool kFull = kFull_;
  // Pieces of four sums that a thread looks for.
  static constexpr int kPolled = !kFull ? 5 : 2 * kExpertTiles + (kPerLane > 8);
};

// Complements: that of zero is not zero.
constexpr uint32_t kZero = 0xffffffffu;
__device__ __forceinline__ uint32_t Encode(float sum) { return max(~__float_as_uint(sum), 1u); }
__device__ __forceinline__ float Decode(uint32_t word) { return __uint_as_float(~word); }

__device__ __forceinline__ void Publish(uint32_t* to, uint32_t word) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}

__device__ __forceinline__ uint4 Look(const uint32_t* from) {
  uint4 words;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from)
               : "memory");
  return words;
}

// c += a b for a [16, 16] and b [16, 8]; a thread brings columns of any permutation, the same in a
// and b.
__device__ __forceinline__ void Mma(float4& c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void CopyLater(uint16_t* to, const uint16_t* eight) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(SharedAddress(to)), "l"(eight)
               : "memory");
}

// The selecting warp works with the others through these barriers; the last is of the others alone.
enum Barrier { kScored = 1, kSelected = 2, kWorkers = 3 };

template <Barrier kBarrier>
__device__ __forceinline__ void Sync() {
  constexpr int kCount = kBarrier == kWorkers ? kThreads : kThreads + kWarp;
  asm volatile("bar.sync %0, %1;" ::"n"(static_cast<int>(kBarrier)), "n"(kCount) : "memory");
}

// Columns from `begin` on of all tokens.
template <typename S>
__device__ __forceinline__ void Stage(const Problem& p, int begin, int end,
                                      uint16_t (&staged)[S::kStagedTokens][S::kPitch]) {
  constexpr int kParts = S::kColumns / 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < S::kTokens * kParts; i += kThreads) {
    int token = i / kParts, column = begin + i % kParts * 8;
    uint16_t* to = &staged[token][i % kParts * 8];
    if (token < p.num_tokens && column < end) {
      CopyLater(to, p.x + int64_t{token} * p.width + column);
    } else {
      *reinterpret_cast<uint4*>(to) = {0, 0, 0, 0};
    }
  }
}

// The warp's sums, over its columns of the slice.
template <typename S, typename Gate>
__device__ __forceinline__ void Multiply(const Problem& p, const Gate& gate,
                                         uint16_t (&staged)[S::kStagedTokens][S::kPitch],
                                         float4 (&acc)[S::kExpertTiles][S::kTokenTiles]) {
  int warp = threadIdx.x / kWarp, row = threadIdx.x % kWarp / 4;
  int first_expert = blockIdx.x * S::kExperts + row;
  int first_token = warp % S::kTokenWarps * S::kTokenTiles * kTileTokens + row;
  int first_column = warp / S::kTokenWarps * S::kGroups * kGroup + threadIdx.x % 4 * 8;
  int end = min((static_cast<int>(blockIdx.y) + 1) * p.slice, p.width);
  const uint4 zero = {0, 0, 0, 0};
#pragma unroll 1
  for (int begin = blockIdx.y * p.slice; begin < end; begin += S::kColumns) {
    uint4 w[S::kGroups][S::kExpertTiles][2], x[S::kGroups][S::kTokenTiles];
#pragma unroll
    for (int g = 0; g < S::kGroups; ++g) {
      int column = begin + first_column + g * kGroup;
#pragma unroll
      for (int i = 0; i < 2 * S::kExpertTiles; ++i) {
        int expert = first_expert + i * 8;
        w[g][i / 2][i % 2] =
            column < end && expert < p.num_experts ? gate.Load8(expert, column) : zero;
      }
    }
    if constexpr (S::kStaged) {
      Stage<S>(p, begin, end, staged);
      asm volatile("cp.async.wait_all;" ::: "memory");
      Sync<kWorkers>();
    }
#pragma unroll
    for (int g = 0; g < S::kGroups; ++g) {
      int column = first_column + g * kGroup;
#pragma unroll
      for (int t = 0; t < S::kTokenTiles; ++t) {
        int token = first_token + t * kTileTokens;
        x[g][t] = zero;
        if constexpr (S::kStaged) {
          x[g][t] = *reinterpret_cast<const uint4*>(&staged[token][column]);
        } else if (begin + column < end && token < p.num_tokens) {
          const auto* from = p.x + int64_t{token} * p.width + begin + column;
          x[g][t] = __ldg(reinterpret_cast<const uint4*>(from));
        }
      }
    }
#pragma unroll
    for (int g = 0; g < S::kGroups; ++g) {
#pragma unroll
      for (int e = 0; e < S::kExpertTiles; ++e) {
        const uint4 &upper = w[g][e][0], &lower = w[g][e][1];
#pragma unroll
        for (int t = 0; t < S::kTokenTiles; ++t) {
          Mma(acc[e][t], upper.x, lower.x, upper.y, lower.y, x[g][t].x, x[g][t].y);
          Mma(acc[e][t], upper.z, lower.z, upper.w, lower.w, x[g][t].z, x[g][t].w);
        }
      }
    }
    if constexpr (S::kStaged) Sync<kWorkers>();
  }
}

// The token's sums of the thread's four experts, over all slices.
template <int kPolled>
__device__ __forceinline__ float4 Collect(const Problem& p, uint32_t* sums, int padded_experts) {
  int quad = threadIdx.x / p.lanes_of_quad, first = threadIdx.x % p.lanes_of_quad;
  float4 sum = {0, 0, 0, 0};
  if (quad < p.NumQuads()) {
    uint32_t* from = sums + first * padded_experts + quad * 4;
    int step = p.lanes_of_quad * padded_experts;
    uint4 words[kPolled];
    bool missing;
    do {
      missing = false;
#pragma unroll
      for (int i = 0; i < kPolled; ++i) {
        words[i] = {kZero, kZero, kZero, kZero};
        if (first + i * p.lanes_of_quad < p.num_slices) words[i] = Look(from + i * step);
      }
#pragma unroll
      for (int i = 0; i < kPolled; ++i) {
        missing |= min(min(words[i].x, words[i].y), min(words[i].z, words[i].w)) == 0;
      }
    } while (missing);
#pragma unroll
    for (int i = 0; i < kPolled; ++i) {
      if (first + i * p.lanes_of_quad < p.num_slices) {
        *reinterpret_cast<uint4*>(from + i * step) = {0, 0, 0, 0};
      }
      sum.x += Decode(words[i].x), sum.y += Decode(words[i].y);
      sum.z += Decode(words[i].z), sum.w += Decode(words[i].w);
    }
  }
  for (int offset = 1; offset < p.lanes_of_quad; offset *= 2) {
    sum.x += __shfl_xor_sync(kAllLanes, sum.x, offset);
    sum.y += __shfl_xor_sync(kAllLanes, sum.y, offset);
    sum.z += __shfl_xor_sync(kAllLanes, sum.z, offset);
    sum.w += __shfl_xor_sync(kAllLanes, sum.w, offset);
  }
  return sum;
}

// What the selecting warp does for each of the block's tokens. A short launch waits longer for
// instructions than for their results, so that the warp first selects from nothing while the others
// multiply, which brings the instructions.
template <typename S>
__device__ __forceinline__ void SelectTokens(const Problem& p, int first_token, int num_blocks,
                                             TokenExperts<S::kPerLane>& experts) {
  if (first_token >= p.num_tokens) return;
  float numbers[S::kPerLane];
#pragma unroll
  for (int i = 0; i < S::kPerLane; ++i) {
    numbers[i] = static_cast<int>(threadIdx.x % kWarp) - i * kWarp;
  }
  StoreLane(experts.numbers, numbers);
  StoreLane(experts.scores, numbers);
  __syncwarp();
  float* weights = experts.scores;
  auto* ids = reinterpret_cast<int32_t*>(experts.numbers);
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
  __shared__ union {
    float4 of_warps[kWarps][S::kFragments][kWarp];
    __align__(16) uint16_t staged[S::kStagedTokens][S::kPitch];
  } shared;
  auto& of_warps = shared.of_warps;
  __shared__ __align__(16) TokenExperts<S::kPerLane> experts;
  const int num_blocks = gridDim.x * gridDim.y, block = blockIdx.y * gridDim.x + blockIdx.x;
  if (threadIdx.x >= kThreads) {
    SelectTokens<S>(p, block, num_blocks, experts);
    return;
  }
  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  float4 acc[S::kExpertTiles][S::kTokenTiles] = {};
  Multiply<S>(p, gate, shared.staged, acc);
#pragma unroll
  for (int i = 0; i < S::kFragments; ++i) {
    of_warps[warp][i][lane] = acc[i / S::kTokenTiles][i % S::kTokenTiles];
  }
  Sync<kWorkers>();

  int padded_experts = gridDim.x * S::kExperts, stored_experts = p.NumQuads() * 4;
  uint32_t* sums = reinterpret_cast<uint32_t*>(arena) + p.first_sum;
  for (int i = warp; i < S::kTokenWarps * S::kFragments; i += kWarps) {
    int tokens_warp = i / S::kFragments, fragment = i % S::kFragments;
    float4 sum = of_warps[tokens_warp][fragment][lane];
#pragma unroll
    for (int w = 1; w < S::kColumnWarps; ++w) {
      float4 other = of_warps[w * S::kTokenWarps + tokens_warp][fragment][lane];
      sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
    }
    // Of a lane's fragment: experts lane / 4 and 8 later, tokens 2 (lane % 4) and the next.
    int token = (tokens_warp * S::kTokenTiles + fragment % S::kTokenTiles) * kTileTokens;
    int expert = blockIdx.x * S::kExperts + fragment / S::kTokenTiles * kTileExperts + lane / 4;
    token += lane % 4 * 2;
    uint32_t* to = sums + (token * p.num_slices + blockIdx.y) * padded_experts + expert;
    uint32_t* next = to + p.num_slices * padded_experts;
    bool first_stored = expert < stored_experts, later_stored = expert + 8 < stored_experts;
    if (token < p.num_tokens && first_stored) Publish(to, Encode(sum.x));
    if (token + 1 < p.num_tokens && first_stored) Publish(next, Encode(sum.y));
    if (token < p.num_tokens && later_stored) Publish(to + 8, Encode(sum.z));
    if (token + 1 < p.num_tokens && later_stored) Publish(next + 8, Encode(sum.w));
  }

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

// Words of the arena that no launch has had for as long as possible.
uint32_t TakeWords(uint32_t num_words) {
  uint32_t first = next_words.load(), begin;
  do {
    begin = first + num_words <= kArenaWords ? first : 0;
  } while (!next_words.compare_exchange_weak(first, begin + num_words));
  return begin;
}

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
  p.first_sum = TakeWords(p.num_tokens * p.num_slices * num_tiles * S::kExperts);
  DenseRouter<S><<<dim3(num_tiles, p.num_slices), kThreads + kWarp, 0, stream>>>(p, gate);
  return CudaStatus(cudaGetLastError());
}

template <int kPerLane, bool kFull, int kGroups, typename Gate>
ffi::Error LaunchForTokens(cudaStream_t stream, const Problem& p, const Gate& gate) {
  if (p.num_tokens <= 8) return Launch<Shape<1, 1, 1, kGroups, kPerLane, kFull>>(stream, p, gate);
  if (p.num_tokens <= 16) return Launch<Shape<1, 2, 1, kGroups, kPerLane, kFull>>(stream, p, gate);
  return Launch<Shape<2, 8, 2, 2, kPerLane, kFull>>(stream, p, gate);
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
                ffi::Result<ffi::AnyBuffer> scores) {
  DSV4_CHECK(ExpectDenseRouter(x, gate, scales, global_scale, bias, *weights, *ids, *scores));
  Problem p = {};
  p.num_tokens = x.dimensions()[0];
  if (p.num_tokens == 0) return ffi::Error::Success();
  if (!IsHopper()) {
    if (LaunchDenseRouterSm100 == nullptr) {
      return ffi::Error(ffi::ErrorCode::kUnimplemented,
                        "dense_router: this library is built for Hopper");
    }
    return LaunchDenseRouterSm100(stream, {x, gate, scales, global_scale, bias, scale, *weights,
                                           *ids, *scores});
  }
  p.x = static_cast<const uint16_t*>(x.untyped_data());
  p.bias = bias.typed_data<float>();
  p.width = x.dimensions()[1];
  p.num_experts = bias.element_count();
  p.top_k = ids->dimensions()[1];
  p.scale = scale;
  p.weights = weights->typed_data<float>();
  p.ids = ids->typed_data<int32_t>();
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
