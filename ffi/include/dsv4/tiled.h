// Tiled weights (dsv4_jax/formats/tiled.py): blocks of 64 outputs x 128 inputs.
#pragma once

#include <cstdint>

#include "dsv4/formats.h"

namespace dsv4 {

enum class WeightFormat : int32_t { kMxfp4, kNvfp4, kFp8Block, kBf16 };
constexpr int kNumWeightFormats = 4;

constexpr int kBlockRows = 64, kBlockColumns = 128, kStepsPerBlock = 8;
constexpr int kWarpTilesPerBlock = 4, kWarpTileRows = 16;
constexpr int kChunkBytes = 512;  // 16 bytes for each lane of a warp

// Chunks of a warp tile.
DSV4_HOST_DEVICE constexpr int NumChunks(WeightFormat format) {
  return format == WeightFormat::kBf16 ? 8 : format == WeightFormat::kFp8Block ? 4 : 2;
}

DSV4_HOST_DEVICE constexpr int CodeBytes(WeightFormat format) {
  return kWarpTilesPerBlock * NumChunks(format) * kChunkBytes;
}

// Scales of a block.
DSV4_HOST_DEVICE constexpr int ScaleBytes(WeightFormat format) {
  return format == WeightFormat::kMxfp4      ? 256
         : format == WeightFormat::kNvfp4    ? 512
         : format == WeightFormat::kFp8Block ? 1
                                             : 0;
}

}  // namespace dsv4
