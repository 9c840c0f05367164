// Indexer keys in registers, as rows of the A operand of a warpgroup's matrix products.
//
// Four neighbouring lanes share a key of 128 channels: lane c of them has the 32 consecutive
// channels from 32 c on, one group of an MXFP4 key. The order of channels inside a product is free
// as long as queries have the same: `Arrange` puts eight channels of a query where `Decode` puts
// those of a key. Scales become powers of two relative to the key's largest, which E4M3 holds
// exactly within 2^14 of it, and one factor per key.
#pragma once

#include <cstdint>

#include "dsv4/formats.h"

namespace dsv4 {

constexpr int kKeyWidth = 128;
constexpr int kQuad = 4;  // lanes of a key

// Matrix products of E4M3 numbers, 32 channels a step, or of BF16 numbers, 16 channels.
struct MmaE4m3 {
  using Eight = uint2;  // channels
  static constexpr int kSteps = 4, kElementBytes = 1;
};

struct MmaBf16 {
  using Eight = uint4;
  static constexpr int kSteps = 8, kElementBytes = 2;
};

template <typename Mma>
struct KeyFragment {
  // Of a step: row, row + 8 of the first half of the channels, row, row + 8 of the second.
  uint32_t words[Mma::kSteps][4];
  float factors[2];  // of row and row + 8

  // Word i of a lane's part of a row: first and second half of each step in turn.
  __device__ __forceinline__ uint32_t& At(int row, int i) {
    return words[i / 2][2 * (i % 2) + row];
  }
};

// The magnitudes of E2M1 codes 0..7, times 2^(6 - d), as E4M3 bytes; entry d of 32.
__device__ __forceinline__ void FillMagnitudes(uint2* table) {
  auto* bytes = reinterpret_cast<uint8_t*>(table);
#pragma unroll 1
  for (int i = threadIdx.x; i < 32 * 8; i += blockDim.x) {
    bytes[i] = EncodeE4m3(DecodeE2m1(i % 8) * BitCast<float>((127 + 6 - i / 8) << 23));
  }
}

__device__ __forceinline__ uint32_t PermuteBytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
  return bytes;
}

// Products of pairs of BF16 numbers; exact for those used here.
__device__ __forceinline__ uint32_t MultiplyBf16x2(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

__device__ __forceinline__ uint32_t Twice(uint32_t bf16) { return bf16 | bf16 << 16; }

__device__ __forceinline__ uint32_t Word(uint4 x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

// The largest of four neighbouring lanes, of each half of x.
__device__ __forceinline__ uint32_t QuadMaxHalves(uint32_t x) {
  x = __vmaxu2(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return __vmaxu2(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// E2M1 codes: as E4M3 the even channels of eight come before the odd ones, as BF16 channels r and
// r + 4 make pairs.
struct Fp4Codes {
  static constexpr int kCodeBytes = 64;
  uint4 codes;

  __device__ static uint2 Arrange(uint2 q) {
    return {PermuteBytes(q.x, q.y, 0x6420), PermuteBytes(q.x, q.y, 0x7531)};
  }

  __device__ static uint4 Arrange(uint4 q) {
    return {PermuteBytes(q.x, q.z, 0x5410), PermuteBytes(q.x, q.z, 0x7632),
            PermuteBytes(q.y, q.w, 0x5410), PermuteBytes(q.y, q.w, 0x7632)};
  }

  __device__ static const uint8_t* CodesOfLane(const uint8_t* codes, int lane) {
    return codes + 16 * lane;
  }

  __device__ __forceinline__ void LoadCodes(const uint8_t* at) {
    codes = __ldg(reinterpret_cast<const uint4*>(at));
  }

  // `magnitudes`: the E4M3 bytes of codes 0..7.
  __device__ __forceinline__ void Expand(KeyFragment<MmaE4m3>& a, int row, uint2 magnitudes) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t word = Word(codes, i), selectors = word & 0x77777777u;
      uint32_t low = PermuteBytes(magnitudes.x, magnitudes.y, selectors);
      uint32_t high = PermuteBytes(magnitudes.x, magnitudes.y, selectors >> 16);
      a.At(row, 2 * i) = PermuteBytes(low, high, 0x6420) | ((word << 4) & 0x80808080u);
      a.At(row, 2 * i + 1) = PermuteBytes(low, high, 0x7531) | (word & 0x80808080u);
    }
  }

  // `units`: of the first and the second 16 channels, 2^126 times the scale.
  __device__ __forceinline__ void Expand(KeyFragment<MmaBf16>& a, int row, uint2 units) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      uint32_t x = Word(codes, i / 4) << (12 - 4 * (i % 4));
      uint32_t unscaled = (x & 0x80008000u) | ((x & 0x70007000u) >> 6);  // times 2^-126
      a.At(row, i) = MultiplyBf16x2(unscaled, i < 8 ? units.x : units.y);
    }
  }
};

struct Mxfp4Key : Fp4Codes {
  static constexpr int kScaleBytes = 4;
  uint32_t scale;

  __device__ static const uint8_t* ScalesOfLane(const uint8_t* scales, int lane) {
    return scales + lane;
  }

  __device__ __forceinline__ void Load(const uint8_t* codes_at, const uint8_t* scale_at) {
    LoadCodes(codes_at);
    scale = __ldg(scale_at);
  }

  __device__ static __forceinline__ void Decode(const Mxfp4Key (&keys)[2], KeyFragment<MmaE4m3>& a,
                                                const uint2* magnitudes) {
    uint32_t scales = keys[0].scale | keys[1].scale << 16, largest = QuadMaxHalves(scales);
    uint32_t difference = __vminu2(largest - scales, 0x001f001fu);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      keys[row].Expand(a, row, magnitudes[row ? difference >> 16 : difference & 0xffffu]);
      a.factors[row] = DecodeE8m0(row ? largest >> 16 : largest & 0xffffu) * 0.015625f;
    }
  }

  __device__ static __forceinline__ void Decode(const Mxfp4Key (&keys)[2], KeyFragment<MmaBf16>& a,
                                                const uint2*) {
    uint32_t scales = keys[0].scale | keys[1].scale << 16, largest = QuadMaxHalves(scales);
    uint32_t difference = __vminu2(largest - scales, 0x00fd00fdu);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      uint32_t unit = Twice((253u - (row ? difference >> 16 : difference & 0xffffu)) << 7);
      keys[row].Expand(a, row, uint2{unit, unit});
      a.factors[row] = DecodeE8m0(row ? largest >> 16 : largest & 0xffffu);
    }
  }
};

struct Nvfp4Key : Fp4Codes {
  static constexpr int kScaleBytes = 8;
  uint32_t scales;

  __device__ static const uint8_t* ScalesOfLane(const uint8_t* scales, int lane) {
    return scales + 2 * lane;
  }

  __device__ __forceinline__ void Load(const uint8_t* codes_at, const uint8_t* scales_at) {
    LoadCodes(codes_at);
    scales = __ldg(reinterpret_cast<const uint16_t*>(scales_at));
  }

  // 2^117 times an E4M3 scale; times 2^126 it could overflow.
  __device__ static __forceinline__ uint32_t Unit(uint32_t scale) {
    float unit = DecodeE4m3(scale) * BitCast<float>((117u + 127u) << 23);
    return Twice(BitCast<uint32_t>(unit) >> 16);
  }

  __device__ static __forceinline__ void Decode(const Nvfp4Key (&keys)[2], KeyFragment<MmaBf16>& a,
                                                const uint2*) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      keys[row].Expand(a, row, uint2{Unit(keys[row].scales), Unit(keys[row].scales >> 8)});
      a.factors[row] = 512.0f;
    }
  }
};

// E4M3 codes: as BF16 channels r and r + 2 of four make pairs.
struct Fp8Key {
  static constexpr int kCodeBytes = 128, kScaleBytes = 4;
  uint4 codes[2];
  float scale;

  __device__ static uint2 Arrange(uint2 q) { return q; }

  __device__ static uint4 Arrange(uint4 q) {
    return {PermuteBytes(q.x, q.y, 0x5410), PermuteBytes(q.x, q.y, 0x7632),
            PermuteBytes(q.z, q.w, 0x5410), PermuteBytes(q.z, q.w, 0x7632)};
  }

  __device__ static const uint8_t* CodesOfLane(const uint8_t* codes, int lane) {
    return codes + 32 * lane;
  }

  __device__ static const uint8_t* ScalesOfLane(const uint8_t* scales, int) { return scales; }

  __device__ __forceinline__ void Load(const uint8_t* codes_at, const uint8_t* scale_at) {
    codes[0] = __ldg(reinterpret_cast<const uint4*>(codes_at));
    codes[1] = __ldg(reinterpret_cast<const uint4*>(codes_at) + 1);
    scale = __ldg(reinterpret_cast<const float*>(scale_at));
  }

  __device__ static __forceinline__ void Decode(const Fp8Key (&keys)[2], KeyFragment<MmaE4m3>& a,
                                                const uint2*) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int i = 0; i < 8; ++i) a.At(row, i) = Word(keys[row].codes[i / 4], i % 4);
      a.factors[row] = keys[row].scale;
    }
  }

  __device__ static __forceinline__ void Decode(const Fp8Key (&keys)[2], KeyFragment<MmaBf16>& a,
                                                const uint2*) {
    const uint32_t unit = Twice((120u + 127u) << 7);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        uint32_t pair = Word(keys[row].codes[i / 8], i / 2 % 4) >> (8 * (i % 2));
        pair = ((pair << 8) & 0x80008000u) | ((pair & 0x007f007fu) << 4);  // times 2^-120
        a.At(row, i) = MultiplyBf16x2(pair, unit);
      }
      a.factors[row] = keys[row].scale;
    }
  }
};

}  // namespace dsv4
