// Tiled weights (dsv4_jax/formats/tiled.py) as A operands of m16k16 bfloat16 matrix instructions.
//
// A block is 64 outputs x 128 inputs = 4 warp tiles of 16 outputs. Lane l of a warp owns, of
// outputs l / 4 and l / 4 + 8, the inputs 32 (l % 4) + 4 s + {0, 1, 2, 3} in step s = 0..7.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dsv4/tiled.h"

namespace dsv4 {

struct Fragment {
  uint32_t x[4];
};

// Two bfloat16 factors of a lane, each in both halves of a word: outputs l / 4 and l / 4 + 8.
struct RowScales {
  uint32_t x[2];
};

__device__ __forceinline__ uint32_t MultiplyBf16x2(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

constexpr uint32_t kSigns = 0x80008000u;

// Codes placed into the low bits of a bfloat16's exponent and mantissa are short of a power of two,
// 2^126 for E2M1 and 2^120 for E4M3. `RowScales` bring it in, except for a factor `kUnscale` that
// is left to the accumulator so that scales up to 2^31 or more stay finite.

template <WeightFormat format>
struct WeightTiles;

struct Fp4Tiles {
  static constexpr int kStepsPerChunk = 4;

  // Word `step` of a chunk as four registers; tiled.py says where their bits lie.
  static __device__ __forceinline__ Fragment Decode(const uint4& chunk, int step,
                                                    RowScales scales) {
    constexpr uint32_t kMagnitudes = 0x01C001C0u;
    uint32_t word = (&chunk.x)[step];
    uint32_t first = word & (kSigns | kMagnitudes);
    uint32_t second = __funnelshift_r(word, word, 3) & (kSigns | kMagnitudes);
    uint32_t third = ((word >> 6) & kMagnitudes) | ((word << 15) & kSigns);
    uint32_t fourth = ((word << 3) & kMagnitudes) | ((word << 14) & kSigns);
    return {{MultiplyBf16x2(first, scales.x[0]), MultiplyBf16x2(second, scales.x[1]),
             MultiplyBf16x2(third, scales.x[0]), MultiplyBf16x2(fourth, scales.x[1])}};
  }
};

template <>
struct WeightTiles<WeightFormat::kMxfp4> : Fp4Tiles {
  using RawScale = uint16_t;
  static constexpr float kUnscale = 0x1p30f;

  static __device__ __forceinline__ RawScale LoadScale(const uint8_t* block, int warp_tile,
                                                       int lane) {
    return reinterpret_cast<const RawScale*>(block)[warp_tile * 32 + lane];
  }

  static __device__ __forceinline__ RowScales Scales(RawScale raw, int /*chunk*/) {
    constexpr uint32_t kSpread = 0x00800080u, kBias = (126 - 30) * kSpread;
    return {{(raw & 0xffu) * kSpread + kBias, (raw >> 8) * kSpread + kBias}};
  }
};

template <>
struct WeightTiles<WeightFormat::kNvfp4> : Fp4Tiles {
  using RawScale = uint32_t;
  static constexpr float kUnscale = 0x1p19f;

  static __device__ __forceinline__ RawScale LoadScale(const uint8_t* block, int warp_tile,
                                                       int lane) {
    return reinterpret_cast<const RawScale*>(block)[warp_tile * 32 + lane];
  }

  static __device__ __forceinline__ RowScales Scales(RawScale raw, int chunk) {
    // E5M3 with bias 10: the byte is a bfloat16's last bits of the exponent and first of the
    // mantissa.
    constexpr uint32_t kSpread = 0x00100010u, kBias = (127 + 126 - 19 - 10) * 8 * kSpread;
    return {{((raw >> (16 * chunk)) & 0xffu) * kSpread + kBias,
             ((raw >> (16 * chunk + 8)) & 0xffu) * kSpread + kBias}};
  }
};

template <>
struct WeightTiles<WeightFormat::kFp8Block> {
  using RawScale = uint8_t;
  static constexpr int kStepsPerChunk = 2;
  static constexpr float kUnscale = 0x1p30f;

  static __device__ __forceinline__ RawScale LoadScale(const uint8_t* block, int /*warp_tile*/,
                                                       int /*lane*/) {
    return *block;
  }

  static __device__ __forceinline__ RowScales Scales(RawScale raw, int /*chunk*/) {
    constexpr uint32_t kSpread = 0x00800080u, kBias = (120 - 30) * kSpread;
    uint32_t scale = raw * kSpread + kBias;
    return {{scale, scale}};
  }

  static __device__ __forceinline__ Fragment Decode(const uint4& chunk, int step,
                                                    RowScales scales) {
    constexpr uint32_t kMagnitudes = 0x07F007F0u;
    Fragment fragment;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      uint32_t word = (&chunk.x)[2 * step + row];
      uint32_t first = (word & kSigns) | ((word >> 4) & kMagnitudes);
      uint32_t second = ((word << 8) & kSigns) | ((word << 4) & kMagnitudes);
      fragment.x[row] = MultiplyBf16x2(first, scales.x[row]);
      fragment.x[2 + row] = MultiplyBf16x2(second, scales.x[row]);
    }
    return fragment;
  }
};

template <>
struct WeightTiles<WeightFormat::kBf16> {
  struct RawScale {};
  static constexpr int kStepsPerChunk = 1;
  static constexpr float kUnscale = 1;

  static __device__ __forceinline__ RawScale LoadScale(const uint8_t*, int, int) { return {}; }
  static __device__ __forceinline__ RowScales Scales(RawScale, int) { return {}; }
  static __device__ __forceinline__ Fragment Decode(const uint4& chunk, int /*step*/, RowScales) {
    return {{chunk.x, chunk.y, chunk.z, chunk.w}};
  }
};

}  // namespace dsv4
