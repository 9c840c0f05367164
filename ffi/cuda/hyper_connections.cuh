// Hyper-connections: spread of an output over the streams, then the next collapse and norm, in one
// pass over memory. What the parts of the kernel share; `HcPre` says who does what.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cluster.cuh"
#include "dsv4/hyper_connections.h"

namespace dsv4 {
namespace hyper {

constexpr int kWarp = 32;
constexpr int kTileTokens = 8;
constexpr int kLaneChannels = 8;
constexpr int kWarpChannels = 4 * kLaneChannels;
constexpr int kMixWarps = 8;
constexpr int kBlockChannels = kMixWarps * kWarpChannels;
constexpr int kMixThreads = kMixWarps * kWarp;
constexpr int kGateWarps = 3;
constexpr int kNormWarp = kMixWarps + kGateWarps;
constexpr int kThreads = (kNormWarp + 1) * kWarp;
constexpr int kMaxRanks = 16;
// Of a token: the projections, the sum of squares, and what rounds up to 16 bytes.
constexpr int kSums = kGateRows + 4;
constexpr int kSumPieces = kSums / 4;
constexpr int kRowTiles = kGateRows / 8;

// In tiles: read ahead, and from mixing to collapsing and to norming.
constexpr uint32_t kAhead = 3, kCollapseLag = 2, kNormLag = 3;
constexpr uint32_t kStages = kAhead + kNormLag;
// What is written for a tile replaces what was read before the tile of kCollapseLag + 1 earlier was
// collapsed, or of kNormLag earlier normed; the threads that write have waited for that.
constexpr uint32_t kSlots = 4;
static_assert(kSlots > kNormLag && kGateWarps < kSlots, "");

struct Problem {
  const uint16_t* output;   // [num_tokens, width] bfloat16
  const uint16_t* streams;  // [num_tokens, 4, width] bfloat16
  const float* post;        // [num_tokens, 4]
  const float* comb;        // [num_tokens, 4 (from), 4 (to)]
  const float* fn;          // [24, 4 width]
  const float* base;
  const float* scale;
  const float* norm_weight;
  int num_tokens, width, log2_ranks, num_iterations;
  float eps, norm_eps;
  uint16_t* new_streams;
  uint16_t* x;  // [num_tokens, width] bfloat16
  float* new_post;
  float* new_comb;
};

struct Shared {
  uint4 tiles[kStages][kNumStreams + 1][kMixThreads];  // of each thread its own channels
  float4 mixing[kAhead][kMixWarps][kNumStreams + 1][kTileTokens];  // post, rows of comb
  float of_warps[kSlots][kMixWarps][kTileTokens][kSums];
  float of_ranks[kSlots][kMaxRanks][kSums];  // of the tokens that this block owns
  float totals[kGateWarps][kSums];
  float4 pre[kSlots][kTileTokens];
  float squares_of_warps[kSlots][kMixWarps][kTileTokens];
  float squares_of_ranks[kSlots][kMaxRanks][kTileTokens];
  float norm_scale[kSlots][kTileTokens];
  uint64_t summed[kSlots], gathered[kSlots], gated[kSlots];
  uint64_t collapsed[kSlots], squared[kSlots], normed[kSlots];
};
static_assert(sizeof(Shared) <= 227 << 10, "a block has no more");

__device__ __forceinline__ float2 Unpack(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

__device__ __forceinline__ uint32_t Pack(float2 x) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(x.x, x.y);
  return *reinterpret_cast<uint32_t*>(&pair);
}

__device__ __forceinline__ float Reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float Sigmoid(float x) { return Reciprocal(1.0f + expf(-x)); }

// Over the four lanes of a token; all of them get the same sum.
__device__ __forceinline__ float SumOfQuad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Sixteen bytes, or zeros. Complete after WaitCopiesExcept.
__device__ __forceinline__ void CopyAsync(void* destination, const void* source, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(destination)),
               "l"(source), "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void WaitCopiesExcept() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// To the same offset in block `rank`, and 16 bytes to its barrier.
__device__ __forceinline__ void SendAsync(void* destination, float4 x, uint64_t* barrier,
                                          uint32_t rank) {
  StoreInCluster(ClusterAddress(destination, rank), ClusterAddress(barrier, rank), x.x, x.y, x.z,
                 x.w);
}

// c += a b for a [16, 16] and b [16, 8] bfloat16.
__device__ __forceinline__ void Mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Sums of squares of 8 tokens, on the diagonals of products of the tokens with each other: in the
// upper rows of the first sums and in the lower rows of the second.
struct Squares {
  float sums[2][4] = {};

  __device__ __forceinline__ void Add(const uint4& x) {
    Multiply(sums[0], x.x, x.y, x.x);
    Multiply(sums[1], x.x, x.y, x.y);
    Multiply(sums[0], x.z, x.w, x.z);
    Multiply(sums[1], x.z, x.w, x.w);
  }
  // Of token t, in lane SquareLane(t).
  __device__ __forceinline__ float Sum(int lane) const {
    return lane / 4 % 2 ? sums[0][1] + sums[1][3] : sums[0][0] + sums[1][2];
  }

 private:
  static __device__ __forceinline__ void Multiply(float (&c)[4], uint32_t a0, uint32_t a1,
                                                  uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
  }
};

__device__ __forceinline__ int SquareLane(int token) { return 4 * token + token / 2; }

// Eight channels of one token: streams[k] = post_k output + sum_j comb[j, k] streams[j].
struct Mixing {
  float4 post, comb[kNumStreams];

  __device__ __forceinline__ static float Element(const float4& x, int i) {
    return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
  }

  __device__ __forceinline__ void Apply(uint4 output, uint4 (&streams)[kNumStreams]) const {
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      float2 x[kNumStreams], o = Unpack((&output.x)[pair]);
#pragma unroll
      for (int j = 0; j < kNumStreams; ++j) x[j] = Unpack((&streams[j].x)[pair]);
#pragma unroll
      for (int k = 0; k < kNumStreams; ++k) {
        float2 y = {0.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < kNumStreams; ++j) {
          y.x = fmaf(Element(comb[j], k), x[j].x, y.x);
          y.y = fmaf(Element(comb[j], k), x[j].y, y.y);
        }
        y.x = fmaf(Element(post, k), o.x, y.x);
        y.y = fmaf(Element(post, k), o.y, y.y);
        (&streams[k].x)[pair] = Pack(y);
      }
    }
  }
};

// Which tokens and channels are whose.
struct Place {
  uint32_t log2_ranks, num_ranks, rank;
  uint32_t cluster, num_clusters, num_tiles;  // tiles of this cluster

  __device__ __forceinline__ explicit Place(const Problem& p) {
    log2_ranks = p.log2_ranks;
    num_ranks = 1 << log2_ranks;
    rank = blockIdx.x & (num_ranks - 1);
    cluster = blockIdx.x >> log2_ranks;
    num_clusters = gridDim.x >> log2_ranks;
    uint32_t all = (p.num_tokens + kTileTokens - 1) / kTileTokens;
    num_tiles = (all - cluster + num_clusters - 1) / num_clusters;
  }
  __device__ __forceinline__ int FirstToken(uint32_t tile) const {
    return (cluster + tile * num_clusters) * kTileTokens;
  }
};

__device__ __forceinline__ uint32_t SlotParity(uint32_t tile) { return tile / kSlots & 1; }

}  // namespace hyper
}  // namespace dsv4
