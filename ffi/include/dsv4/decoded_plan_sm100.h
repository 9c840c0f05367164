// How products with tiled weights are cut up on the sm_100 family, where weights are decoded into
// operands of tcgen05. Plain C++: kernels and launchers take their constants from here.
#pragma once

#include <cstdint>

#include "dsv4/gemm_segment.h"

namespace dsv4::sm100 {

// How a product's operands meet: as bfloat16, or as E4M3 codes with power-of-two scales for 32
// columns of K. Codes are of rounded inputs and of weights that E4M3 holds.
enum class Operands : int32_t { kBfloat16, kCodes };

constexpr bool HasCodes(WeightFormat format) {
  return format == WeightFormat::kMxfp4 || format == WeightFormat::kFp8Block;
}

// Consecutive rows of input that meet the same weights, at most those of a tile.
struct RowBlock {
  int32_t group, first_row, num_rows, unused;
};

// Bytes that tiles of inputs need for each row and block of 128 columns.
constexpr int32_t kInputBytes = 2 * kBlockColumns;

// A tile of outputs is 128 weight rows x kRows input rows; a stage is 128 columns of K.
template <WeightFormat format, int32_t kRows, Operands operands>
struct DecodedTile {
  static_assert(kRows % 32 == 0 && kRows <= 128, "the instruction's and its scales' sizes");
  static constexpr bool kCodes = operands == Operands::kCodes;
  static constexpr int32_t kLanes = 128, kAtomBytes = 128;
  static constexpr int32_t kAtoms = kCodes ? 1 : 2;  // of 128 bytes of K, what a swizzle spans
  static constexpr int32_t kAtomColumns = kBlockColumns / kAtoms;
  static constexpr int32_t kStepBytes = 32;  // of K in one instruction
  static constexpr int32_t kSteps = kAtoms * kAtomBytes / kStepBytes;

  // What arrives: two blocks of weights side by side, and scales of rows, a word each.
  static constexpr int32_t kCodeBytes = CodeBytes(format);
  static constexpr bool kLaneScales = ScaleBytes(format) >= 256;
  static constexpr int32_t kScaleBytes = kLaneScales ? ScaleBytes(format) : 0;
  static constexpr int32_t kRowScaleBytes = kCodes ? 4 * kRows : 0;
  static constexpr int32_t kRawBytes = 2 * (kCodeBytes + kScaleBytes) + kRowScaleBytes;
  static constexpr int32_t kRawStages = format == WeightFormat::kBf16 ? 2 : 4;

  // What is multiplied: weights, rows, and blocks of 128 x 4 scales of each.
  static constexpr int32_t kWeightBytes = kAtoms * kLanes * kAtomBytes;
  static constexpr int32_t kRowBytes = kAtoms * kRows * kAtomBytes;
  static constexpr int32_t kScaleBlockBytes = kCodes ? 512 : 0;
  static constexpr int32_t kUsedBytes = kWeightBytes + kRowBytes + 2 * kScaleBlockBytes;
  static constexpr int32_t kAlignment = 1024;
  static constexpr int32_t kStageBytes = (kUsedBytes + kAlignment - 1) / kAlignment * kAlignment;

  // Where the blocks of a cluster, which share a tile's K, exchange partial sums.
  static constexpr bool kCanSplit = kRows <= 64;
  static constexpr int32_t kExchangeBytes = kCanSplit ? kRows * kLanes * 4 : 0;

  static constexpr int32_t kSharedBytes = 224 * 1024;  // of 227 KiB
  static constexpr int32_t kFittingStages =
      (kSharedBytes - kAlignment - kRawStages * kRawBytes - kExchangeBytes) / kStageBytes;
  static constexpr int32_t kStages = kFittingStages < 6 ? kFittingStages : 6;
  static_assert(kStages >= 2, "shared memory");
  static constexpr int32_t kDynamicBytes =
      kAlignment + kStages * kStageBytes + kRawStages * kRawBytes + kExchangeBytes;

  // Tensor memory: two accumulators, then scales of weights and of rows.
  static constexpr int32_t kAccumulators = 2;
  static constexpr int32_t kWeightScaleColumn = kAccumulators * kRows;
  static constexpr int32_t kRowScaleColumn = kWeightScaleColumn + 4;
  static constexpr int32_t kUsedColumns = kCodes ? kRowScaleColumn + 4 : kWeightScaleColumn;
  static constexpr int32_t kColumns = kUsedColumns <= 64    ? 64
                                      : kUsedColumns <= 128 ? 128
                                      : kUsedColumns <= 256 ? 256
                                                            : 512;
};

constexpr int32_t kFewTileRows = 64, kManyTileRows = 128;

// Rows of a tile, of groups of this mean size or of one group of as many.
inline int32_t ChooseTileRows(int64_t rows) {
  return rows <= kFewTileRows ? kFewTileRows : kManyTileRows;
}

// How many row blocks there can be.
inline int64_t MaxRowBlocks(int64_t rows, int64_t groups, int32_t tile_rows) {
  return rows / tile_rows + (rows < groups ? rows : groups);
}

// Blocks that share the K of a tile, where there are few tiles.
inline int32_t ChooseClusterSize(int64_t tiles, int64_t stages, int32_t tile_rows,
                                 int32_t num_multiprocessors) {
  int32_t size = 1;
  if (tile_rows > kFewTileRows) return size;
  while (size < 8 && tiles * size * 2 <= num_multiprocessors && size * 2 <= stages) size *= 2;
  return size;
}

}  // namespace dsv4::sm100
