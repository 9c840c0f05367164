// How an NVFP4 product is cut into tiles, clusters and pipeline stages on the sm_100 family. Plain
// C++: the kernel takes its constants from here, the launcher and the tests their launches.
#pragma once

#include <cstdint>

#include "dsv4/formats.h"

namespace dsv4::sm100 {

// The products of a launch. Group g has the next group_sizes[g] tokens and its own weights,
// rows g * num_features on. A dense product is one group.
struct Problem {
  int32_t num_tokens, num_features, width, num_groups;
};

constexpr int32_t kTileFeatures = 128;  // rows of operand A: lanes of the accumulator
constexpr int32_t kStageWidth = 256;    // of K in a pipeline stage: 128 bytes, the swizzle's width
constexpr int32_t kStepWidth = 64;      // of K in one instruction and in one block of scales
constexpr int32_t kStageSteps = kStageWidth / kStepWidth;
constexpr int32_t kScaleRows = 128;     // rows in one block of scales
constexpr int32_t kScaleBytes = 512;
constexpr int32_t kTensorColumns = 512;
constexpr int32_t kSharedBytes = 220 * 1024;  // of 227 KiB; the rest is for barriers and groups
constexpr int32_t kMaxGroups = 512;
// Tiles begin at multiples of this many tokens: scales of later rows of a block are reached by
// skipping columns of tensor memory, two at a time.
constexpr int32_t kTileAlignment = 64;
constexpr int32_t kSwizzleAtom = 1024;  // what shared memory of swizzled boxes is aligned to

DSV4_HOST_DEVICE constexpr int32_t CeilDiv(int32_t a, int32_t b) { return (a + b - 1) / b; }

// What follows from the number of tokens in a tile.
template <int32_t kTokens>
struct Tile {
  static_assert(kTokens % 32 == 0 && kTokens <= 256, "the instruction's and its scales' sizes");
  static constexpr int32_t kBoxBytes = kStageWidth / 2;
  static constexpr int32_t kTokenScaleBlocks = CeilDiv(kTokens + kTileAlignment, kScaleRows);

  // A stage: box of weights, box of tokens, scales of weights, scales of tokens.
  static constexpr int32_t kWeightBytes = kTileFeatures * kBoxBytes;
  static constexpr int32_t kTokenBytes = kTokens * kBoxBytes;
  static constexpr int32_t kScaleRunBytes = kStageSteps * kScaleBytes;
  static constexpr int32_t kStageBytes =
      kWeightBytes + kTokenBytes + (1 + kTokenScaleBlocks) * kScaleRunBytes;

  // Where the blocks of a cluster, which share a tile's K, exchange partial sums. Few tokens only.
  static constexpr bool kCanSplit = kTokens <= 64;
  static constexpr int32_t kExchangeBytes = kCanSplit ? kTokens * kTileFeatures * 4 : 0;

  static constexpr int32_t kFittingStages =
      (kSharedBytes - kExchangeBytes - kSwizzleAtom) / kStageBytes;
  static constexpr int32_t kStages = kFittingStages < 8 ? kFittingStages : 8;
  static constexpr int32_t kDynamicBytes = kStages * kStageBytes + kExchangeBytes + kSwizzleAtom;

  // Tensor memory: two accumulators, so that one is stored while the next is computed, then
  // scales of weights and of tokens.
  static constexpr int32_t kAccumulators = 2;
  static constexpr int32_t kWeightScaleColumn = kAccumulators * kTokens;
  static constexpr int32_t kTokenScaleColumn = kWeightScaleColumn + kStageSteps * 4;
  static constexpr int32_t kStepColumns = kTokenScaleBlocks * 4;
  static constexpr int32_t kUsedColumns = kTokenScaleColumn + kStageSteps * kStepColumns;
  static constexpr int32_t kColumns = kUsedColumns <= 128 ? 128 : kUsedColumns <= 256 ? 256 : 512;
  static_assert(kUsedColumns <= kTensorColumns, "tensor memory");
};

struct Plan {
  int32_t tile_tokens;   // of the kernel
  int32_t cluster_size;  // blocks that share the K of a tile
  int32_t num_blocks;
};

constexpr int32_t kTileSizes[] = {32, 64, 128, 192};

inline int32_t ChooseTileTokens(const Problem& problem) {
  // Of a group only the mean size is known here, and it may begin anywhere in an aligned tile.
  bool dense = problem.num_groups == 1;
  int64_t needed = dense ? problem.num_tokens
                         : kTileAlignment / 2 + CeilDiv(problem.num_tokens, problem.num_groups);
  for (int32_t tokens : kTileSizes) {
    bool aligned = tokens >= kTileAlignment || dense;
    if (tokens >= needed && aligned) return tokens;
  }
  return 192;
}

inline Plan MakePlan(const Problem& problem, int32_t num_multiprocessors) {
  Plan plan{ChooseTileTokens(problem), 1, num_multiprocessors};
  if (problem.num_groups > 1) return plan;
  int64_t tiles = static_cast<int64_t>(CeilDiv(problem.num_features, kTileFeatures)) *
                  CeilDiv(problem.num_tokens, plan.tile_tokens);
  if (plan.tile_tokens <= 64) {
    int32_t stages = CeilDiv(problem.width, kStageWidth);
    while (plan.cluster_size < 8 && tiles * plan.cluster_size * 2 <= num_multiprocessors &&
           plan.cluster_size * 2 <= stages) {
      plan.cluster_size *= 2;
    }
  }
  if (tiles * plan.cluster_size < plan.num_blocks) {
    plan.num_blocks = static_cast<int32_t>(tiles) * plan.cluster_size;
  }
  return plan;
}

}  // namespace dsv4::sm100
