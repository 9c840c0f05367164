// dense_router on tcgen05: gate product, activation, selection and weights in one launch.
//
// Clusters share the experts in tiles of 32, the first lanes of an accumulator. The eight blocks
// of a cluster split the width, so that the gate comes through E / 4 multiprocessors; their
// partial sums meet in distributed shared memory, where block r owns the r-th tile of 8 tokens.
// The scores of these tokens meet in device memory; the last of the clusters to arrive there
// selects. Every sum has a fixed order.
#pragma once

#include "cluster.cuh"
#include "decoded_weights_sm100.cuh"
#include "mbarrier.cuh"
#include "router.cuh"
#include "router_gate.cuh"
#include "tcgen05.cuh"

namespace dsv4::sm100 {

struct RouterProblem {
  const uint16_t* x;  // [num_tokens, width] bfloat16
  const float* bias;
  int32_t num_tokens, width, num_experts, top_k;
  float scale;
  float* scores;  // [num_tokens, num_experts]
  float* weights;
  int32_t* ids;
  uint32_t* arrivals;  // of the tiles of tokens: zero between launches
};

constexpr int32_t kRouterSplits = 8;  // blocks of a cluster
constexpr int32_t kRouterWarps = 8, kRouterThreads = 32 * kRouterWarps;
constexpr int32_t kOwnTokens = 8;     // of a block, for each of its warps one
constexpr int32_t kTileExperts = 32;
constexpr int32_t kAtomBytes = 128, kAtomColumns = kAtomBytes / 2, kAtomParts = kAtomBytes / 16;
constexpr int32_t kRoundAtoms = 14;   // of 64 columns, that are in shared memory at a time

template <int32_t kTokens>
struct RouterTile {
  static_assert(kTokens % 16 == 0 && kTokens <= kOwnTokens * kRouterSplits, "tokens");
  static constexpr int32_t kGateBytes = kTileExperts * kAtomBytes;
  static constexpr int32_t kStageBytes = kGateBytes + kTokens * kAtomBytes;
  // Products read 128 rows of the gate. Those behind the tile's are whatever lies there, and so are
  // the lanes of the accumulator that nobody reads.
  static constexpr int32_t kBehind = 128 * kAtomBytes - kGateBytes;
  static constexpr int32_t kAlignment = 1024;
  static constexpr int32_t kDynamicBytes = kAlignment + kRoundAtoms * kStageBytes + kBehind;
  static constexpr int32_t kColumns = kTokens <= 32 ? 32 : 64;
};

struct RouterShared {
  alignas(8) uint64_t multiplied;
  uint32_t tensor_memory;
  bool is_last;
  float of_splits[kRouterSplits][kOwnTokens][kTileExperts];
  alignas(16) TokenExperts<12> experts[kOwnTokens];
};

template <int32_t kTokens, typename Gate>
struct Router {
  using T = RouterTile<kTokens>;

  const RouterProblem& p;
  const Gate& gate;
  RouterShared& shared;
  uint8_t* stages;

  // Copies 16-byte parts of `count` atoms from column `begin` on; `load` takes (row, column).
  template <int32_t kRows, typename Load>
  __device__ __forceinline__ void Stage(int32_t begin, int32_t count, uint8_t* first_stage,
                                        Load load) const {
    constexpr int32_t kAtOnce = 4;  // loads that overlap
    const int32_t parts = count * kRows * kAtomParts;
    for (int32_t first = threadIdx.x; first < parts; first += kAtOnce * kRouterThreads) {
      uint4 values[kAtOnce];
#pragma unroll
      for (int32_t i = 0; i < kAtOnce; ++i) {
        const int32_t part = first + i * kRouterThreads;
        const int32_t row = part / kAtomParts % kRows, atom = part / kAtomParts / kRows;
        const int32_t column = begin + atom * kAtomColumns + part % kAtomParts * 8;
        values[i] = {};
        if (part < parts && column < p.width) values[i] = load(row, column);
      }
#pragma unroll
      for (int32_t i = 0; i < kAtOnce; ++i) {
        const int32_t part = first + i * kRouterThreads;
        if (part >= parts) break;
        const int32_t row = part / kAtomParts % kRows, atom = part / kAtomParts / kRows;
        *reinterpret_cast<uint4*>(first_stage + atom * T::kStageBytes +
                                  PartOffset(row, part % kAtomParts)) = values[i];
      }
    }
  }

  // One thread.
  __device__ __forceinline__ void IssueProducts(int32_t count, bool first_round) const {
    constexpr uint32_t kInstruction = tcgen05::Bfloat16Instruction(128, kTokens);
    constexpr int32_t kStepBytes = 32, kEightRows = 8 * kAtomBytes;
    for (int32_t atom = 0; atom < count; ++atom) {
#pragma unroll
      for (int32_t byte = 0; byte < kAtomBytes; byte += kStepBytes) {
        const uint8_t* a = stages + atom * T::kStageBytes + byte;
        tcgen05::MultiplyBfloat16(
            shared.tensor_memory,
            tcgen05::MatrixDescriptor(a, kEightRows, tcgen05::Swizzle::k128Bytes),
            tcgen05::MatrixDescriptor(a + T::kGateBytes, kEightRows, tcgen05::Swizzle::k128Bytes),
            kInstruction, /*accumulate=*/!first_round || atom > 0 || byte > 0);
      }
    }
    tcgen05::Commit(&shared.multiplied);
  }

  // The sums of the cluster's experts and all tokens over this block's slice of the width.
  __device__ __forceinline__ void Multiply() const {
    const int32_t split = blockIdx.x, first_expert = blockIdx.y * kTileExperts;
    const int32_t atoms = (p.width + kAtomColumns - 1) / kAtomColumns;
    const int32_t slice_end = (split + 1) * atoms / kRouterSplits;
    uint32_t parity = 0;
    const int32_t slice_begin = split * atoms / kRouterSplits;
    for (int32_t atom = slice_begin; atom < slice_end; atom += kRoundAtoms, parity ^= 1) {
      const int32_t count = min(kRoundAtoms, slice_end - atom);
      Stage<kTileExperts>(atom * kAtomColumns, count, stages, [&](int32_t row, int32_t column) {
        const int32_t expert = first_expert + row;
        return expert < p.num_experts ? gate.Load8(expert, column) : uint4{};
      });
      Stage<kTokens>(atom * kAtomColumns, count, stages + T::kGateBytes,
                     [&](int32_t row, int32_t column) {
                       return row < p.num_tokens
                                  ? __ldg(reinterpret_cast<const uint4*>(
                                        p.x + int64_t{row} * p.width + column))
                                  : uint4{};
                     });
      FenceAsyncProxy();
      tcgen05::FenceBeforeSync();
      __syncthreads();
      tcgen05::FenceAfterSync();
      if (threadIdx.x / 32 == 0 && tcgen05::ElectOneThread()) {
        IssueProducts(count, atom == slice_begin);
      }
      WaitBarrier(&shared.multiplied, parity);
      __syncwarp();
      tcgen05::FenceAfterSync();
    }
  }

  // Warp 0 sends the block's sums to the blocks that own the tokens; without columns they are 0.
  __device__ __forceinline__ void SendSums() const {
    const int32_t split = blockIdx.x, expert = threadIdx.x;
    const int32_t atoms = (p.width + kAtomColumns - 1) / kAtomColumns;
    const bool empty = split * atoms / kRouterSplits == (split + 1) * atoms / kRouterSplits;
    for (int32_t first = 0; first < T::kColumns; first += 32) {
      float sums[32] = {};
      if (!empty) tcgen05::LoadColumns(shared.tensor_memory + first, sums);
#pragma unroll
      for (int32_t i = 0; i < 32; ++i) {
        const int32_t token = first + i;
        if (token >= p.num_tokens) continue;
        float* place = &shared.of_splits[split][token % kOwnTokens][expert];
        asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(
                         ClusterAddress(place, token / kOwnTokens)),
                     "f"(sums[i])
                     : "memory");
      }
    }
    tcgen05::FenceBeforeSync();
  }

  __device__ __forceinline__ void StoreScores(int32_t first_token) const {
    const int32_t own = threadIdx.x / kTileExperts, lane = threadIdx.x % kTileExperts;
    const int32_t token = first_token + own, expert = blockIdx.y * kTileExperts + lane;
    if (token >= p.num_tokens || expert >= p.num_experts) return;
    float logit = 0;
#pragma unroll
    for (int32_t s = 0; s < kRouterSplits; ++s) logit += shared.of_splits[s][own][lane];
    p.scores[token * p.num_experts + expert] = SqrtSoftplus(logit * gate.Scale());
  }

  template <int32_t kPerLane>
  __device__ __forceinline__ void Select(int32_t token) const {
    const int32_t warp = threadIdx.x / 32;
    float scores[kPerLane], numbers[kPerLane];
    LoadLane<kPerLane, false>(p.bias, p.num_experts, -Infinity(), numbers);
    LoadLane<kPerLane, false>(p.scores + token * p.num_experts, p.num_experts, 0.0f, scores);
#pragma unroll
    for (int32_t i = 0; i < kPerLane; ++i) numbers[i] = Biased(scores[i], numbers[i]);
    auto& experts = *reinterpret_cast<TokenExperts<kPerLane>*>(&shared.experts[warp]);
    StoreLane(experts.scores, scores);
    StoreLane(experts.numbers, numbers);
    __syncwarp();
    RouteToken<kMaxGateTopK>(numbers, experts, p.top_k, p.scale, p.weights + token * p.top_k,
                             p.ids + token * p.top_k);
  }

  __device__ void Run() const {
    const int32_t warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
      InitBarrier(&shared.multiplied, 1);
      FenceBarrierInit();
    }
    __syncwarp();
    if (warp == 0) tcgen05::Allocate<T::kColumns>(&shared.tensor_memory);
    tcgen05::FenceBeforeSync();
    SyncCluster();  // every block runs before its memory is written
    tcgen05::FenceAfterSync();
    Multiply();
    if (warp == 0) SendSums();
    SyncCluster();
    tcgen05::FenceAfterSync();
    if (warp == 0) tcgen05::Deallocate<T::kColumns>(shared.tensor_memory);

    const int32_t tile = blockIdx.x, first_token = tile * kOwnTokens;
    if (first_token >= p.num_tokens) return;
    StoreScores(first_token);
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      const uint32_t others = gridDim.y - 1;
      shared.is_last = atomicInc(&p.arrivals[tile], others) == others;
      __threadfence();
    }
    __syncthreads();
    const int32_t token = first_token + warp;
    if (!shared.is_last || token >= p.num_tokens) return;
    if (p.num_experts <= 8 * 32) {
      Select<8>(token);
    } else {
      Select<12>(token);
    }
  }
};

template <int32_t kTokens, typename Gate>
__global__ void __cluster_dims__(kRouterSplits) __launch_bounds__(kRouterThreads, 1)
    DenseRouterKernel(const __grid_constant__ RouterProblem p, const __grid_constant__ Gate gate) {
  using T = RouterTile<kTokens>;
  extern __shared__ uint8_t dynamic[];
  __shared__ RouterShared shared;
  const uint32_t past = SharedAddress(dynamic) % T::kAlignment;
  uint8_t* stages = dynamic + (T::kAlignment - past) % T::kAlignment;
  Router<kTokens, Gate>{p, gate, shared, stages}.Run();
}

}  // namespace dsv4::sm100
