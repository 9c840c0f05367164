// NVFP4: E2M1 codes, an E4M3 scale per 16 elements, a float32 scale per row or matrix.
#pragma once

#include <cmath>

#include "dsv4/formats.h"

namespace dsv4 {

constexpr int kNvfp4Group = 16;

// Swizzled scales: blocks of 128 rows x 4 groups, 512 bytes each, all of a row block in a row.
constexpr int kScaleBlockRows = 128, kScaleBlockGroups = 4, kScaleBlockBytes = 512;

DSV4_HOST_DEVICE uint32_t SwizzledScaleOffset(uint32_t row, uint32_t group,
                                              uint32_t blocks_per_row) {
  uint32_t block = row / kScaleBlockRows * blocks_per_row + group / kScaleBlockGroups;
  return block * kScaleBlockBytes + row % 32 * 16 + row % kScaleBlockRows / 32 * 4 + group % 4;
}

// amax / (6 * 448), not below 2^-115; NaN for an infinity or NaN.
DSV4_HOST_DEVICE float Nvfp4GlobalScale(float amax) {
  constexpr float kReciprocal = 1.0f / (kLargestE2m1 * kLargestE4m3), kFloor = 0x1p-115f;
  if ((BitCast<uint32_t>(amax) & 0x7fffffffu) >= 0x7f800000u) return BitCast<float>(0x7fc00000u);
  float scale = amax * kReciprocal;
  return scale > kFloor ? scale : kFloor;
}

// The amax half-way between those of scale codes `code` - 1 and `code`, for a global scale of 1.
DSV4_HOST_DEVICE float Nvfp4ScaleThreshold(uint32_t code) {
  if (code == 0) return -1.0f;
  if (code > 126) return BitCast<float>(0x7f800000u);
  // E4M3 with one more bit of mantissa.
  uint32_t middle = 2 * code - 1;
  float value = middle < 16 ? static_cast<float>(middle) * 0x1p-10f
                            : BitCast<float>((middle + (120u << 4)) << 19);
  return kLargestE2m1 * value;
}

// The E4M3 code nearest to amax / (6 * global_scale), ties to even, given one that is it or next
// to it. Products decide, not the quotient, because not every division rounds alike.
DSV4_HOST_DEVICE uint32_t Nvfp4BlockScale(float amax, float global_scale, uint32_t proposed) {
  float down = Nvfp4ScaleThreshold(proposed) * global_scale;
  float up = Nvfp4ScaleThreshold(proposed + 1) * global_scale;
  bool odd = proposed & 1u;
  bool below = amax < down || (odd && amax == down);
  bool above = amax > up || (odd && amax == up);
  return proposed - below + above;
}

// What codes of a group are multiples of; infinite, so that they are zeros, for a zero scale.
DSV4_HOST_DEVICE float Nvfp4Unit(uint32_t block_scale, float global_scale) {
  float unit = DecodeE4m3(block_scale) * global_scale;
  return unit > 0.0f ? unit : BitCast<float>(0x7f800000u);
}

}  // namespace dsv4
