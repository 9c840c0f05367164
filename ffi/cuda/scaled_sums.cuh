// Codes of tiled weights (tiled.py) for products whose sums, not weights, are scaled.
#pragma once

#include "moe_hopper.cuh"

namespace dsv4 {

// Codes in the exponent's low bits are short of 2^126 or 2^120; inputs bring 2^64 of it, so that no
// product is subnormal.
constexpr uint32_t kInputFactor = 0x5f805f80u;
constexpr float kInputUnscale = 0x1p-64f;

__device__ __forceinline__ uint2 ScaleInputs(uint2 pairs) {
  return {MultiplyBf16x2(pairs.x, kInputFactor), MultiplyBf16x2(pairs.y, kInputFactor)};
}

// A word of E2M1 codes as the four registers of a step, short of 2^126.
__device__ __forceinline__ Fragment UnpackCodes(uint32_t word) {
  constexpr uint32_t kMagnitudes = 0x01C001C0u, kCode = kSigns | kMagnitudes;
  return {{word & kCode, __funnelshift_r(word, word, 3) & kCode,
           ((word >> 6) & kMagnitudes) | ((word << 15) & kSigns),
           ((word << 3) & kMagnitudes) | ((word << 14) & kSigns)}};
}

// Two words of E4M3 codes likewise, short of 2^120.
__device__ __forceinline__ Fragment UnpackCodes(uint32_t low, uint32_t high) {
  constexpr uint32_t kMagnitudes = 0x07F007F0u;
  return {{((low >> 4) & kMagnitudes) | (low & kSigns),
           ((high >> 4) & kMagnitudes) | (high & kSigns),
           ((low << 4) & kMagnitudes) | ((low << 8) & kSigns),
           ((high << 4) & kMagnitudes) | ((high << 8) & kSigns)}};
}

// Of step 2 * part + odd, from a lane's chunks.
template <WeightFormat format>
__device__ __forceinline__ Fragment CodesOfStep(const uint4 (&chunks)[NumChunks(format)], int part,
                                                int odd) {
  if constexpr (format == WeightFormat::kFp8Block) {
    const uint4& chunk = chunks[part];
    return odd ? UnpackCodes(chunk.z, chunk.w) : UnpackCodes(chunk.x, chunk.y);
  } else {
    return UnpackCodes((&chunks[part / 2].x)[part % 2 * 2 + odd]);
  }
}

// The scales of two neighbouring lanes. `Factor` is short of the same power of two as `Scales` of
// the format's WeightTiles: infinite scales are the same ones.
template <WeightFormat format>
struct SumScales;

template <>
struct SumScales<WeightFormat::kMxfp4> {
  static constexpr bool kOfHalves = false;
  uint32_t raw;

  // Of output g + 8 * row and the lane 2 t + share.
  __device__ __forceinline__ float Factor(int /*half*/, int row, int share) const {
    constexpr uint32_t kBias = 96u << 23;
    uint32_t byte = raw >> (8 * (2 * share + row)) & 0xffu;
    return __uint_as_float((byte << 23) + kBias);
  }
};

template <>
struct alignas(8) SumScales<WeightFormat::kNvfp4> {
  static constexpr bool kOfHalves = true;
  uint32_t raw[2];

  __device__ __forceinline__ float Factor(int half, int row, int share) const {
    constexpr uint32_t kBias = 224u << 23;
    uint32_t byte = raw[share] >> (8 * (2 * half + row)) & 0xffu;
    return __uint_as_float((byte << 20) + kBias);
  }
};

// One for the whole block.
template <>
struct SumScales<WeightFormat::kFp8Block> {
  static constexpr bool kOfHalves = false;
  uint32_t raw;

  __device__ __forceinline__ float Factor(int /*half*/, int /*row*/, int /*share*/) const {
    constexpr uint32_t kBias = 90u << 23;
    return __uint_as_float((raw << 23) + kBias);
  }
};

// A warp tile's chunks, of which `first` is the lane's first.
template <int kChunks>
__device__ __forceinline__ void LoadChunks(uint4 (&chunks)[kChunks], const uint8_t* first) {
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    chunks[i] = *reinterpret_cast<const uint4*>(first + i * kChunkBytes);
  }
}

// sums += products of a warp tile's outputs g and g + 8 with a column for each lane 4 g + t of a
// quad g: `load(part)` gives inputs of steps 2 part and 2 part + 1 in lanes whose t is g % 4, and
// zeros in the others. A column has the products of one quad lane's inputs; lane 4 g + t sums those
// of columns 2 t and 2 t + 1, whose scales are `scales`. `chunks` are the lane's.
template <WeightFormat format, typename Load>
__device__ __forceinline__ void AddScaledProducts(float (&sums)[2],
                                                  const uint4 (&chunks)[NumChunks(format)],
                                                  const SumScales<format>& scales, Load load) {
  constexpr int kParts = kStepsPerBlock / 2;
  float acc[4] = {};
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const uint4 inputs = load(part);
    Multiply(acc, CodesOfStep<format>(chunks, part, 0), inputs.x, inputs.y);
    Multiply(acc, CodesOfStep<format>(chunks, part, 1), inputs.z, inputs.w);
    const bool ends_half = part == kParts / 2 - 1;
    if (part != kParts - 1 && !(SumScales<format>::kOfHalves && ends_half)) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[i / 2] += acc[i] * scales.Factor(part / (kParts / 2), i / 2, i % 2);
      acc[i] = 0;
    }
  }
}

}  // namespace dsv4
