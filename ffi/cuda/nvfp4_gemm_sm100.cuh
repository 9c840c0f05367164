// out[token, feature] = sum_k weights[feature, k] * tokens[token, k], both NVFP4, on tcgen05.
//
// Weights are operand A (128 lanes of the accumulator), tokens are operand B: a few tokens make a
// narrow tile and not a mostly empty one, a warp stores neighbouring features of one token, and a
// router's epilogue finds all experts of a token in one column.
//
// One warp copies boxes of codes and runs of scales into a ring of stages, one thread issues
// products into one of two accumulators in tensor memory, four warps store the other. Blocks are
// persistent. Where few tiles would leave multiprocessors idle, the blocks of a cluster take
// slices of K and add their partial sums in the order of their ranks: results are deterministic.
#pragma once

#include <cstdint>

#include "dsv4/nvfp4_plan_sm100.h"
#include "cluster_sums_sm100.cuh"
#include "mbarrier.cuh"
#include "tcgen05.cuh"
#include "tma.cuh"

namespace dsv4::sm100 {

constexpr uint32_t kProducerWarp = 0, kTensorWarp = 1, kFirstStoreWarp = 2;
constexpr uint32_t kThreads = 32 * kFirstStoreWarp + kStoreThreads;

struct Nvfp4Gemm {
  TensorMap weights;  // [num_groups * num_features, width / 2] bytes, boxes of 128 rows
  TensorMap tokens;   // [num_tokens, width / 2] bytes, boxes of a tile's tokens
  // Swizzled blocks [ceil(rows / 128), ceil(width / 64), 512], the weights' for each group apart.
  // Codes past the width count as zeros, so their scales must not be NaN.
  const uint8_t* weight_scales;
  const uint8_t* token_scales;
  const float* weight_global_scales;  // [num_groups]
  const float* token_global_scales;   // [num_tokens]
  const int32_t* group_sizes;         // [num_groups], or null: all tokens are one group's
  Problem problem;
};

// Where a group's tokens and tiles begin; one entry more says where the last group's end.
struct GroupStarts {
  int32_t token[kMaxGroups + 1], tile[kMaxGroups + 1];
};

template <typename Tile>
struct Shared {
  alignas(8) uint64_t full[Tile::kStages], empty[Tile::kStages];
  uint64_t accumulated[Tile::kAccumulators], stored[Tile::kAccumulators];
  uint64_t exchanged;
  uint32_t tensor_memory;
  GroupStarts starts;
};

// The parts of a pipeline stage, and of what lies behind the last.
template <typename Tile>
struct Stages {
  uint8_t* base;

  __device__ explicit Stages(uint8_t* dynamic)
      : base(dynamic + (kSwizzleAtom - SharedAddress(dynamic) % kSwizzleAtom) % kSwizzleAtom) {}
  __device__ uint8_t* Weights(uint32_t slot) const { return base + slot * Tile::kStageBytes; }
  __device__ uint8_t* Tokens(uint32_t slot) const { return Weights(slot) + Tile::kWeightBytes; }
  __device__ uint8_t* WeightScales(uint32_t slot) const {
    return Tokens(slot) + Tile::kTokenBytes;
  }
  __device__ uint8_t* TokenScales(uint32_t slot, int32_t block) const {
    return WeightScales(slot) + (1 + block) * Tile::kScaleRunBytes;
  }
  __device__ float* Exchange() const {
    return reinterpret_cast<float*>(base + Tile::kStages * Tile::kStageBytes);
  }
};

__device__ __forceinline__ int32_t WarpInclusiveSum(int32_t x) {
  int32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int32_t distance = 1; distance < 32; distance *= 2) {
    int32_t other = __shfl_up_sync(~0u, x, distance);
    if (lane >= distance) x += other;
  }
  return x;
}

__device__ __forceinline__ int32_t AlignedStart(int32_t token) {
  return token / kTileAlignment * kTileAlignment;
}

// One warp.
template <int32_t kTokens>
__device__ void FindGroups(const Nvfp4Gemm& gemm, GroupStarts& starts) {
  const Problem& problem = gemm.problem;
  int32_t feature_tiles = CeilDiv(problem.num_features, kTileFeatures);
  int32_t lane = threadIdx.x % 32, next_token = 0, next_tile = 0;
  for (int32_t first = 0; first < problem.num_groups; first += 32) {
    int32_t group = first + lane, size = 0;
    if (group < problem.num_groups) {
      size = gemm.group_sizes ? gemm.group_sizes[group] : problem.num_tokens;
    }
    // Sizes that add up to more tokens than there are must not lead outside of the arrays.
    size = min(max(size, 0), problem.num_tokens);
    int32_t sum = next_token + WarpInclusiveSum(size);
    int32_t begin = min(sum - size, problem.num_tokens), end = min(sum, problem.num_tokens);
    int32_t tiles = end > begin ? feature_tiles * CeilDiv(end - AlignedStart(begin), kTokens) : 0;
    int32_t tiles_end = next_tile + WarpInclusiveSum(tiles);
    if (group < problem.num_groups) {
      starts.token[group + 1] = end;
      starts.tile[group + 1] = tiles_end;
    }
    next_token = __shfl_sync(~0u, end, 31);
    next_tile = __shfl_sync(~0u, tiles_end, 31);
  }
  if (lane == 0) starts.token[0] = starts.tile[0] = 0;
}

// A tile of the output. Its first tokens and its last may belong to neighbouring groups.
struct OutputTile {
  int32_t group, first_feature, first_token, tokens_begin, tokens_end;
};

// The tiles of this cluster, in an order in which neighbours share a group's weights.
template <int32_t kTokens>
class TileWalk {
 public:
  __device__ TileWalk(const Problem& problem, const GroupStarts& starts)
      : problem_(problem), starts_(starts), next_(blockIdx.x / ClusterSize()) {}

  __device__ bool Next(OutputTile& tile) {
    while (group_ < problem_.num_groups && starts_.tile[group_ + 1] <= next_) ++group_;
    if (group_ == problem_.num_groups) return false;
    tile.group = group_;
    tile.tokens_begin = starts_.token[group_];
    tile.tokens_end = starts_.token[group_ + 1];
    int32_t aligned = AlignedStart(tile.tokens_begin);
    int32_t token_tiles = CeilDiv(tile.tokens_end - aligned, kTokens);
    int32_t index = next_ - starts_.tile[group_];
    tile.first_token = aligned + index % token_tiles * kTokens;
    tile.first_feature = index / token_tiles * kTileFeatures;
    next_ += gridDim.x / ClusterSize();
    return true;
  }

 private:
  const Problem& problem_;
  const GroupStarts& starts_;
  int32_t next_, group_ = 0;
};

// The pipeline stages of K that are this block's part of every tile.
struct Slice {
  int32_t begin, end;

  __device__ explicit Slice(int32_t width) {
    int32_t stages = CeilDiv(width, kStageWidth), rank = ClusterRank(), size = ClusterSize();
    begin = rank * stages / size;
    end = (rank + 1) * stages / size;
  }
};

// Instructions that a stage of K holds.
__device__ __forceinline__ int32_t StageSteps(int32_t width, int32_t stage) {
  return min(kStageSteps, CeilDiv(width, kStepWidth) - stage * kStageSteps);
}

// One thread.
template <int32_t kTokens>
__device__ void Produce(const Nvfp4Gemm& gemm, Shared<Tile<kTokens>>& shared,
                        const Stages<Tile<kTokens>>& stages) {
  using T = Tile<kTokens>;
  const Problem& problem = gemm.problem;
  int64_t row_blocks_of_weights = CeilDiv(problem.num_features, kScaleRows);
  int32_t row_blocks_of_tokens = CeilDiv(problem.num_tokens, kScaleRows);
  int64_t blocks_per_row = CeilDiv(problem.width, kStepWidth);
  Slice slice(problem.width);
  RingPosition<T::kStages> ring;
  TileWalk<kTokens> walk(problem, shared.starts);
  for (OutputTile tile; walk.Next(tile);) {
    int64_t weight_block = tile.group * row_blocks_of_weights + tile.first_feature / kScaleRows;
    int32_t token_block = tile.first_token / kScaleRows;
    int32_t token_blocks = min(T::kTokenScaleBlocks, row_blocks_of_tokens - token_block);
    for (int32_t stage = slice.begin; stage < slice.end; ++stage, ring.Advance()) {
      uint64_t* full = &shared.full[ring.slot];
      uint32_t scale_bytes = StageSteps(problem.width, stage) * kScaleBytes;
      int64_t first_block = stage * kStageSteps;
      WaitBarrier(&shared.empty[ring.slot], ring.parity ^ 1);
      ArriveExpectingBytes(full,
                           T::kWeightBytes + T::kTokenBytes + (1 + token_blocks) * scale_bytes);
      LoadBox(stages.Weights(ring.slot), gemm.weights, stage * T::kBoxBytes,
              tile.group * problem.num_features + tile.first_feature, full);
      LoadBox(stages.Tokens(ring.slot), gemm.tokens, stage * T::kBoxBytes, tile.first_token, full);
      LoadBulk(stages.WeightScales(ring.slot),
               gemm.weight_scales + (weight_block * blocks_per_row + first_block) * kScaleBytes,
               scale_bytes, full);
      for (int32_t block = 0; block < token_blocks; ++block) {
        LoadBulk(stages.TokenScales(ring.slot, block),
                 gemm.token_scales +
                     ((token_block + block) * blocks_per_row + first_block) * kScaleBytes,
                 scale_bytes, full);
      }
    }
  }
}

// One thread.
template <int32_t kTokens>
__device__ void Multiply(const Nvfp4Gemm& gemm, Shared<Tile<kTokens>>& shared,
                         const Stages<Tile<kTokens>>& stages) {
  using T = Tile<kTokens>;
  constexpr uint32_t kInstruction = tcgen05::Nvfp4Instruction(kTileFeatures, kTokens);
  constexpr uint32_t kStepBytes = kStepWidth / 2;
  uint32_t weight_scales = shared.tensor_memory + T::kWeightScaleColumn;
  uint32_t token_scales = shared.tensor_memory + T::kTokenScaleColumn;
  Slice slice(gemm.problem.width);
  RingPosition<T::kStages> ring;
  RingPosition<T::kAccumulators> accumulators;
  TileWalk<kTokens> walk(gemm.problem, shared.starts);
  for (OutputTile tile; walk.Next(tile); accumulators.Advance()) {
    uint32_t accumulator = shared.tensor_memory + accumulators.slot * kTokens;
    uint32_t skipped_columns = tile.first_token % kScaleRows / 32;
    WaitBarrier(&shared.stored[accumulators.slot], accumulators.parity ^ 1);
    tcgen05::FenceAfterSync();
    for (int32_t stage = slice.begin; stage < slice.end; ++stage, ring.Advance()) {
      WaitBarrier(&shared.full[ring.slot], ring.parity);
      tcgen05::FenceAfterSync();
      int32_t steps = StageSteps(gemm.problem.width, stage);
      for (int32_t step = 0; step < steps; ++step) {
        tcgen05::CopyScaleBlock(weight_scales + step * 4,
                                stages.WeightScales(ring.slot) + step * kScaleBytes);
#pragma unroll
        for (int32_t block = 0; block < T::kTokenScaleBlocks; ++block) {
          tcgen05::CopyScaleBlock(token_scales + step * T::kStepColumns + block * 4,
                                  stages.TokenScales(ring.slot, block) + step * kScaleBytes);
        }
      }
      for (int32_t step = 0; step < steps; ++step) {
        tcgen05::MultiplyNvfp4(
            accumulator,
            tcgen05::MatrixDescriptor(stages.Weights(ring.slot) + step * kStepBytes, kSwizzleAtom,
                                      tcgen05::Swizzle::k128Bytes),
            tcgen05::MatrixDescriptor(stages.Tokens(ring.slot) + step * kStepBytes, kSwizzleAtom,
                                      tcgen05::Swizzle::k128Bytes),
            kInstruction, weight_scales + step * 4,
            token_scales + step * T::kStepColumns + skipped_columns,
            /*accumulate=*/stage > slice.begin || step > 0);
      }
      tcgen05::Commit(&shared.empty[ring.slot]);
    }
    tcgen05::Commit(&shared.accumulated[accumulators.slot]);
  }
}

// Four warps. Sink is called with (token, feature, value) for every element of the output.
template <int32_t kTokens, typename Sink>
__device__ void Store(const Nvfp4Gemm& gemm, Shared<Tile<kTokens>>& shared, float* exchange,
                      const Sink& sink) {
  using T = Tile<kTokens>;
  const Problem& problem = gemm.problem;
  uint32_t first_lane = threadIdx.x / 32 % 4 * 32;  // a warp reaches only its own lanes
  uint32_t lane = first_lane + threadIdx.x % 32;
  RingPosition<T::kAccumulators> accumulators;
  TileWalk<kTokens> walk(problem, shared.starts);
  for (OutputTile tile; walk.Next(tile); accumulators.Advance()) {
    uint32_t accumulator = shared.tensor_memory + (first_lane << tcgen05::kLaneShift) +
                           accumulators.slot * kTokens;
    int32_t feature = tile.first_feature + lane;
    float weight_scale = gemm.weight_global_scales[tile.group];
    auto finish = [&](int32_t column, float sum) {
      int32_t token = tile.first_token + column;
      bool inside = token >= tile.tokens_begin && token < tile.tokens_end;
      if (inside && feature < problem.num_features) {
        sink(token, feature, sum * weight_scale * gemm.token_global_scales[token]);
      }
    };
    WaitBarrier(&shared.accumulated[accumulators.slot], accumulators.parity);
    tcgen05::FenceAfterSync();
    if (T::kCanSplit && ClusterSize() > 1) {
      if constexpr (T::kCanSplit) {
        ExchangeSums<kTokens>(&shared.exchanged, exchange, accumulator, finish);
      }
    } else {
      for (int32_t first = 0; first < kTokens; first += 32) {
        float sums[32];
        tcgen05::LoadColumns(accumulator + first, sums);
#pragma unroll
        for (int32_t i = 0; i < 32; ++i) finish(first + i, sums[i]);
      }
    }
    tcgen05::FenceBeforeSync();
    Arrive(&shared.stored[accumulators.slot]);
  }
}

// The sink of a linear layer: [tokens, features] in bfloat16.
struct StoreBfloat16 {
  uint16_t* out;
  int64_t num_features;

  __device__ void operator()(int32_t token, int32_t feature, float value) const {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    out[token * num_features + feature] = bits;
  }
};

template <typename Tile>
__device__ void InitBarriers(Shared<Tile>& shared) {
  for (int32_t i = 0; i < Tile::kStages; ++i) {
    InitBarrier(&shared.full[i], 1);
    InitBarrier(&shared.empty[i], 1);
  }
  for (int32_t i = 0; i < Tile::kAccumulators; ++i) {
    InitBarrier(&shared.accumulated[i], 1);
    InitBarrier(&shared.stored[i], kStoreThreads);
  }
  InitBarrier(&shared.exchanged, ClusterSize() * kStoreThreads);
  FenceBarrierInit();
}

template <int32_t kTokens, typename Sink>
__global__ void __launch_bounds__(kThreads, 1)
    Nvfp4GemmKernel(const __grid_constant__ Nvfp4Gemm gemm, const __grid_constant__ Sink sink) {
  using T = Tile<kTokens>;
  extern __shared__ uint8_t dynamic[];
  __shared__ Shared<T> shared;
  Stages<T> stages(dynamic);
  uint32_t warp = threadIdx.x / 32;

  if (warp == kProducerWarp && tcgen05::ElectOneThread()) {
    PrefetchTensorMap(gemm.weights);
    PrefetchTensorMap(gemm.tokens);
    InitBarriers(shared);
  }
  if (warp == kTensorWarp) tcgen05::Allocate<T::kColumns>(&shared.tensor_memory);
  if (warp == kFirstStoreWarp) FindGroups<kTokens>(gemm, shared.starts);
  __syncwarp();
  tcgen05::FenceBeforeSync();
  SyncCluster();
  tcgen05::FenceAfterSync();

  if (warp == kProducerWarp) {
    if (tcgen05::ElectOneThread()) Produce<kTokens>(gemm, shared, stages);
  } else if (warp == kTensorWarp) {
    if (tcgen05::ElectOneThread()) Multiply<kTokens>(gemm, shared, stages);
  } else {
    Store<kTokens>(gemm, shared, stages.Exchange(), sink);
  }

  __syncwarp();
  tcgen05::FenceBeforeSync();
  __syncthreads();
  tcgen05::FenceAfterSync();
  if (warp == kTensorWarp) tcgen05::Deallocate<T::kColumns>(shared.tensor_memory);
}

}  // namespace dsv4::sm100
