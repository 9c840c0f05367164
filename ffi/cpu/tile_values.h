// Values of tiled weights and rounded rows, one by one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "dsv4/formats.h"
#include "dsv4/tiled.h"

namespace dsv4 {

// Weights [outputs, width] in blocks, without their global scale.
class TileValues {
 public:
  TileValues(WeightFormat format, const uint8_t* codes, const uint8_t* scales, int64_t width)
      : format_(format),
        codes_(codes),
        scales_(scales),
        blocks_per_row_((width + kBlockColumns - 1) / kBlockColumns) {}

  float At(int64_t n, int64_t k) const {
    const int64_t block = n / kBlockRows * blocks_per_row_ + k / kBlockColumns;
    const int warp_tile = n % kBlockRows / kWarpTileRows, row = n % kWarpTileRows / 8;
    const int lane = n % 8 * 4 + k % kBlockColumns / 32;
    const int step = k % 32 / 4, j = k % 4;
    const uint8_t* tile =
        codes_ + block * CodeBytes(format_) + warp_tile * NumChunks(format_) * kChunkBytes;
    const auto word = [&](int index) {
      uint32_t bits;
      std::memcpy(&bits, tile + index / 4 * kChunkBytes + lane * 16 + index % 4 * 4, 4);
      return bits;
    };
    const uint8_t* scales = scales_ + block * ScaleBytes(format_);
    const int lane_of_block = warp_tile * 32 + lane;
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    switch (format_) {
      case WeightFormat::kBf16:
        return FromBfloat16(word(4 * step + row + j / 2 * 2) >> (j % 2 * 16));
      case WeightFormat::kFp8Block: {
        constexpr int kByte[] = {1, 3, 0, 2};
        const uint32_t code = word(2 * step + row) >> (8 * kByte[j]) & 0xff;
        return DecodeE4m3(code) * (*scales >= 165 ? kInfinity : DecodeE8m0(*scales));
      }
      case WeightFormat::kMxfp4: {
        const uint8_t scale = scales[lane_of_block * 2 + row];
        return Fp4(word(step), row, j) * (scale >= 159 ? kInfinity : DecodeE8m0(scale));
      }
      case WeightFormat::kNvfp4: {
        const uint8_t scale = scales[lane_of_block * 4 + step / 4 * 2 + row];
        const float value = std::ldexp(1.0f + scale % 8 / 8.0f, scale / 8 - 10);
        return Fp4(word(step), row, j) * (scale >= 0xf8 ? kInfinity : value);
      }
    }
    return 0;
  }

 private:
  static float Fp4(uint32_t word, int row, int j) {
    constexpr int kMagnitude[] = {6, 9, 12, 3}, kSign[] = {15, 18, 0, 1};
    const int part = row + j / 2 * 2, half = j % 2 * 16;
    const uint32_t magnitude = word >> (kMagnitude[part] + half) & 7;
    const uint32_t sign = word >> ((kSign[part] + half) % 32) & 1;
    return DecodeE2m1(magnitude | sign << 3);
  }

  WeightFormat format_;
  const uint8_t *codes_, *scales_;
  int64_t blocks_per_row_;
};

// The power-of-two scale of up to 128 values that become E4M3 codes.
inline float RowScale(const float* values, int64_t count) {
  uint32_t amax = BitCast<uint32_t>(1e-4f);  // As integers NaNs are above all numbers.
  for (int64_t i = 0; i < count; ++i) {
    amax = std::max(amax, BitCast<uint32_t>(values[i]) & 0x7fffffffu);
  }
  return DecodeE8m0(ScaleE8m0(BitCast<float>(amax), 1.0f / kLargestE4m3));
}

// Values to E4M3 and back, in groups of 128 with a scale each.
inline void RoundRow(float* row, int64_t width) {
  constexpr int64_t kGroup = 128;
  for (int64_t begin = 0; begin < width; begin += kGroup) {
    const int64_t end = std::min(width, begin + kGroup);
    const float scale = RowScale(row + begin, end - begin);
    for (int64_t i = begin; i < end; ++i) {
      row[i] = DecodeE4m3(EncodeE4m3(row[i] / scale)) * scale;
    }
  }
}

}  // namespace dsv4
