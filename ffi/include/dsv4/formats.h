// The number formats, for host and device: FP4 E2M1, FP8 E4M3, power-of-two scales E8M0.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DSV4_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DSV4_HOST_DEVICE inline
#endif

namespace dsv4 {

template <typename To, typename From>
DSV4_HOST_DEVICE To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

DSV4_HOST_DEVICE float FromBfloat16(uint16_t bits) { return BitCast<float>(uint32_t{bits} << 16); }

// To nearest, ties to even; NaN stays NaN.
DSV4_HOST_DEVICE uint16_t ToBfloat16(float x) {
  uint32_t bits = BitCast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// E2M1: codes 0..7 for 0, 0.5, 1, 1.5, 2, 3, 4, 6; bit 3 is the sign.

constexpr float kLargestE2m1 = 6.0f;

DSV4_HOST_DEVICE float DecodeE2m1(uint32_t code) {
  uint32_t doubled = (0xC8643210u >> (4 * (code & 7u))) & 15u;
  float magnitude = 0.5f * static_cast<float>(doubled);
  return code & 8u ? -magnitude : magnitude;
}

// The code nearest to x / unit, ties to even, larger magnitudes to 6. Compares with products of
// `unit` instead of dividing; an infinite unit gives zeros of x's sign.
DSV4_HOST_DEVICE uint32_t EncodeE2m1(float x, float unit) {
  float magnitude = BitCast<float>(BitCast<uint32_t>(x) & 0x7fffffffu);
  uint32_t code = magnitude > 0.25f * unit;
  code += magnitude >= 0.75f * unit;
  code += magnitude > 1.25f * unit;
  code += magnitude >= 1.75f * unit;
  code += magnitude > 2.5f * unit;
  code += magnitude >= 3.5f * unit;
  code += magnitude > 5.0f * unit;
  return code | ((BitCast<uint32_t>(x) >> 28) & 8u);
}

// E4M3: four bits of exponent with bias 7, no infinity, 0x7F and 0xFF are NaN.

constexpr float kLargestE4m3 = 448.0f;

DSV4_HOST_DEVICE float DecodeE4m3(uint32_t code) {
  uint32_t exponent = (code >> 3) & 15u, mantissa = code & 7u;
  float magnitude = exponent == 0
                        ? static_cast<float>(mantissa) * 0.001953125f
                        : BitCast<float>(((exponent + 120u) << 23) | (mantissa << 20));
  if ((code & 0x7fu) == 0x7fu) magnitude = BitCast<float>(0x7fc00000u);
  return code & 0x80u ? -magnitude : magnitude;
}

// To nearest, ties to even, magnitudes above 448 to 448; NaN stays NaN.
DSV4_HOST_DEVICE uint32_t EncodeE4m3(float x) {
  uint32_t bits = BitCast<uint32_t>(x), sign = (bits >> 24) & 0x80u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7fu;
  if (bits >= 0x43e00000u) return sign | 0x7eu;
  if (bits < 0x3c800000u) {
    // Below 2^-6 codes are multiples of 2^-9: adding 1.5 * 2^14 leaves them in the last bits.
    return sign | (BitCast<uint32_t>(BitCast<float>(bits) + 24576.0f) & 0xfu);
  }
  bits += 0x7ffffu + ((bits >> 20) & 1u);
  return sign | ((bits >> 20) - (120u << 3));
}

// E8M0: byte b stands for 2^(b - 127), 255 for NaN.

DSV4_HOST_DEVICE float DecodeE8m0(uint32_t code) {
  if (code == 0) return BitCast<float>(0x00400000u);
  return BitCast<float>(code == 255u ? 0x7fc00000u : code << 23);
}

// The byte of 2^ceil(log2(amax / largest)) of an amax that is not below the format's floor, given
// the float32 reciprocal of the format's largest value; 255 for an infinity or NaN.
DSV4_HOST_DEVICE uint32_t ScaleE8m0(float amax, float reciprocal_of_largest) {
  uint32_t bits = BitCast<uint32_t>(amax * reciprocal_of_largest);
  uint32_t code = ((bits >> 23) & 255u) + ((bits & 0x7fffffu) != 0);
  return code < 255u ? code : 255u;
}

}  // namespace dsv4
