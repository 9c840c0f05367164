// The tiles of a product with many rows, and the ring in shared memory through which they pass.
#pragma once

#include "dsv4/gemm_segment.h"
#include "gemm_input.cuh"
#include "mbarrier.cuh"

namespace dsv4 {

struct TiledParams {
  GemmSegment gemm;
  const uint8_t* inputs;
  const float* input_scales;  // of codes
  int32_t num_rows, row_tiles, blocks_per_row, outputs_per_group;
  int32_t token_tiles, num_tiles;  // of the clusters, those of the same outputs follow each other
  int32_t ranks;                   // the blocks of a cluster
};

constexpr int kMaxRanks = 8;

// With `kCodes` the inputs are E4M3 codes and the weights become such codes.
template <WeightFormat format, int kTokens, bool kCodes>
struct TiledRing {
  static_assert(!kCodes || format == WeightFormat::kFp8Block || format == WeightFormat::kMxfp4);
  static constexpr int kConsumers = 2, kConsumerThreads = kConsumers * 128;
  static constexpr int kThreads = kConsumerThreads + 128;
  static constexpr int kRows = kConsumers * kBlockRows, kRowStride = kRows + 4;
  static constexpr int kParts = kCodes ? 1 : 2, kPartBytes = kTokens / 8 * kTileBytes;
  static constexpr int kBlockScaleBytes =
      format == WeightFormat::kFp8Block ? 0 : ScaleBytes(format);
  static constexpr int kStageBytes = kParts * kPartBytes +
                                     kConsumers * (CodeBytes(format) + kBlockScaleBytes) +
                                     kCodes * kTokens * 4;
  // Outputs leave through shared memory, so many tokens at a time.
  static constexpr int kLeavingTokens = kTokens < 64 ? kTokens : kCodes || kTokens < 256 ? 64 : 16;
  static constexpr int kLeavingBytes = kConsumers * kLeavingTokens * kBlockRows * 2;
  static constexpr int kRingBytes = 227 * 1024 - 256 - kLeavingBytes, kMaxStages = 8;
  static constexpr int kStages =
      kRingBytes / kStageBytes < kMaxStages ? kRingBytes / kStageBytes : kMaxStages;
  static_assert(kStages >= 2);

  struct Stages {
    alignas(1024) uint8_t inputs[kStages][kParts][kPartBytes];  // as the swizzle requires
    uint8_t codes[kStages][kConsumers][CodeBytes(format)];
    uint8_t scales[kStages][kConsumers][kBlockScaleBytes + (kBlockScaleBytes == 0)];
    alignas(16) float input_scales[kStages][kCodes ? kTokens : 1];
  };

  struct Shared {
    union {
      Stages ring;
      float sums[kTokens * kRowStride];
    };
    alignas(128) uint8_t leaving[kConsumers][kLeavingTokens][kBlockRows * 2];
    uint64_t full[kStages], empty[kStages];
  };

  // A block's share of a tile: rows of weights, rows of input, a range of blocks of 128 inputs.
  struct Work {
    int ranks, rank;  // of the inputs
    int row_block, first_token, begin, end;
    int first_input_block;  // of the group

    __device__ __forceinline__ Work(const TiledParams& p, int tile)
        : ranks(p.ranks), rank(blockIdx.x % p.ranks) {
      first_token = tile % p.token_tiles * kTokens;
      row_block = tile / p.token_tiles * kConsumers;
      begin = p.blocks_per_row * rank / ranks;
      end = p.blocks_per_row * (rank + 1) / ranks;
      first_input_block = row_block * kBlockRows / p.outputs_per_group * p.blocks_per_row;
    }

    __device__ __forceinline__ int InputTiles(const TiledParams& p) const {
      return min(kTokens / 8, p.row_tiles - first_token / 8);
    }
  };
};

}  // namespace dsv4
