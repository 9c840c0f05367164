// E2M1 codes under power-of-two scales as E4M3 codes under one scale for 128 inputs of an output.
#pragma once

#include "weight_tiles.cuh"

namespace dsv4 {

// Of the codes in tiled FP4 weights (tiled.py), outputs l / 4 and l / 4 + 8.
//
// The largest scale of an output's four groups of 32 inputs gets E4M3's largest exponent. Codes
// under scales down to 2^-14 of it are exact; below they lose what is less than 2^-9 of the unit.
class Fp4Codes {
 public:
  // `raw` is a lane's scale bytes; the lanes of a quad hold the four groups.
  __device__ __forceinline__ explicit Fp4Codes(uint16_t raw) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int scale = raw >> (8 * row) & 0xff;
      int largest = max(scale, __shfl_xor_sync(0xffffffffu, scale, 1));
      largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      largest_[row] = largest;
      magnitudes_[row] = Magnitudes(scale - largest + kTopShift);
    }
  }

  // Two words, steps s and s + 1, as registers (s; l / 4), (s; l / 4 + 8), (s + 1; l / 4),
  // (s + 1; l / 4 + 8).
  __device__ __forceinline__ uint4 Decode(uint32_t first, uint32_t second) const {
    return {EvenRow(first), OddRow(first), EvenRow(second), OddRow(second)};
  }

  // What a row's codes are short of. From 2^32 on scales are infinite, as in bfloat16.
  __device__ __forceinline__ float Factor(int row) const {
    constexpr int kInfinite = 159, kUnit = 6 - kTopShift;
    const int exponent = largest_[row] >= kInfinite ? 255 : max(largest_[row] + kUnit, 0);
    return __uint_as_float(exponent << 23);
  }

 private:
  static constexpr int kTopShift = 12;

  // E4M3 codes of 2^(shift - 6) times 0, 0.5, 1, 1.5, 2, 3, 4, 6.
  static __device__ __forceinline__ uint2 Magnitudes(int shift) {
    // Up to 2^-5 the codes are multiples of 2^-9.
    const int lost = min(-2 - shift, 8);
    const uint32_t kept = (0xffu >> max(lost, 0)) * 0x01010101u;
    uint2 codes = {0x03020100u >> max(lost, 0) & kept, 0x0c080604u >> max(lost, 0) & kept};
    if (shift == -1) codes = {0x06040200u, 0x14100c08u};
    if (shift == 0) codes = {0x0c080400u, 0x1c181410u};
    if (shift > 0) codes = {0x0c080000u + shift * 0x08080800u, 0x1c181410u + shift * 0x08080808u};
    return codes;
  }

  // Four codes from the magnitudes' places in nibbles 0, 1, 4 and 5, and their signs.
  static __device__ __forceinline__ uint32_t Look(uint2 magnitudes, uint32_t places,
                                                  uint32_t signs) {
    return __byte_perm(magnitudes.x, magnitudes.y, __byte_perm(places, 0, 0x4420)) | signs;
  }

  __device__ __forceinline__ uint32_t EvenRow(uint32_t word) const {
    return Look(magnitudes_[0], (word >> 12 & 0x00070007u) | (word >> 2 & 0x00700070u),
                (word & 0x80008000u) | (word << 7 & 0x00800080u));
  }

  __device__ __forceinline__ uint32_t OddRow(uint32_t word) const {
    return Look(magnitudes_[1], (word >> 3 & 0x00070007u) | (word >> 5 & 0x00700070u),
                (__funnelshift_r(word, word, 3) & 0x80008000u) | (word << 6 & 0x00800080u));
  }

  int largest_[2];
  uint2 magnitudes_[2];
};

}  // namespace dsv4
