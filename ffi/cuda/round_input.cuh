// Q1: bfloat16 values rounded to E4M3 under one power-of-two scale, by bfloat16 arithmetic.
#pragma once

#include <cstdint>

#include "dsv4/formats.h"

namespace dsv4 {

__device__ __forceinline__ uint32_t AddBf16x2(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}

__device__ __forceinline__ uint32_t SubtractBf16x2(uint32_t a, uint32_t b) {
  uint32_t difference;
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  return difference;
}

// All bits of the halves in which a < b.
__device__ __forceinline__ uint32_t LessBf16x2(uint32_t a, uint32_t b) {
  uint32_t mask;
  asm("set.lt.u32.bf16x2 %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(b));
  return mask;
}

// The scale byte of a group whose largest magnitude is `amax`, the bits of a bfloat16.
__device__ __forceinline__ uint32_t InputScale(uint32_t amax) {
  constexpr float kFloor = 1e-4f, kReciprocal = 1.0f / kLargestE4m3;
  // As integers NaNs are above infinity and all numbers.
  uint32_t bits = max(amax << 16, __float_as_uint(kFloor));
  return ScaleE8m0(__uint_as_float(bits), kReciprocal);
}

// The larger magnitude in each half.
__device__ __forceinline__ uint32_t MaxMagnitude(uint32_t a, uint32_t b) {
  return __vmaxu2(a & 0x7fff7fffu, b & 0x7fff7fffu);
}

// Two values of a group with this scale byte, to nearest, ties to even.
__device__ __forceinline__ uint32_t RoundInput(uint32_t pair, uint32_t scale) {
  // Four significant bits of eight stay, unless that is finer than 2^-9 scales: then the sum with
  // a number of that unit rounds. The scale is at least 2^-22, so that nothing is subnormal.
  const uint32_t coarse = (pair + 0x00070007u + ((pair >> 4) & 0x00010001u)) & 0xfff0fff0u;
  const uint32_t unit = (((scale - 2) << 7) | 0x40u) * 0x00010001u;
  const uint32_t fine = SubtractBf16x2(AddBf16x2(pair, unit), unit);
  const uint32_t limit = ((scale - 6) << 7) * 0x00010001u;
  const uint32_t small = LessBf16x2(pair & 0x7fff7fffu, limit);
  const uint32_t nan = scale == 255 ? 0x7fc07fc0u : 0;
  return (fine & small) | (coarse & ~small) | nan;
}

// Four values of a group as E4M3 codes, in the order 2, 0, 3, 1 of tiled FP8 weights.
__device__ __forceinline__ uint32_t InputCodes(uint32_t low, uint32_t high, uint32_t scale) {
  // A scale byte of 255 gives NaN. The inverse of a power of two is exact.
  const float inverse = __uint_as_float(scale == 255 ? 0x7fc00000u : (254 - scale) << 23);
  const auto pair = [&](float first, float second) {
    uint16_t codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
        : "=h"(codes)
        : "f"(second * inverse), "f"(first * inverse));
    return uint32_t{codes};
  };
  const auto value = [](uint32_t bits) { return __uint_as_float(bits << 16); };
  return pair(value(high & 0xffffu), value(low & 0xffffu)) |
         pair(value(high >> 16), value(low >> 16)) << 16;
}

}  // namespace dsv4
