// Rows of a gate as pieces of eight bfloat16 weights, whatever they are stored as.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "dsv4/formats.h"

namespace dsv4 {

// Eight to shared memory, asynchronously; zeros where there is nothing to copy.
__device__ __forceinline__ void CopyLater(uint16_t* to, const uint16_t* from, bool exists) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}

struct Bfloat16Gate {
  const uint16_t* weights;  // [E, width]
  int64_t width;

  __device__ __forceinline__ uint4 Load8(int64_t expert, int column) const {
    return __ldg(reinterpret_cast<const uint4*>(weights + expert * width + column));
  }
  __device__ __forceinline__ void Copy8(uint16_t* to, int64_t expert, int column,
                                        bool exists) const {
    CopyLater(to, weights + expert * width + column, exists);
  }
  __device__ __forceinline__ float Scale() const { return 1.0f; }
};

struct Nvfp4Gate {
  const uint8_t* codes;       // [E, width / 2]
  const uint8_t* scales;      // [E, width / 16] E4M3
  const float* global_scale;  // [1]
  int64_t width;

  __device__ __forceinline__ uint4 Load8(int64_t expert, int column) const {
    int64_t first = expert * width + column;
    uint32_t eight = __ldg(reinterpret_cast<const uint32_t*>(codes + first / 2));
    // E2M1 codes and E4M3 scales are exact in bfloat16, and so are their products.
    float scale = DecodeE4m3(__ldg(scales + first / 16));
    __nv_bfloat162 factor = __float2bfloat162_rn(scale);
    uint4 result;
    uint32_t* pair = &result.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i] = Scaled(eight >> (8 * i), factor);
    return result;
  }
  __device__ __forceinline__ void Copy8(uint16_t* to, int64_t expert, int column,
                                        bool exists) const {
    *reinterpret_cast<uint4*>(to) = exists ? Load8(expert, column) : uint4{};
  }
  __device__ __forceinline__ float Scale() const { return __ldg(global_scale); }

 private:
  // Exponent and mantissa of E2M1 are the lowest of bfloat16's, 2^126 away.
  static __device__ __forceinline__ uint32_t Scaled(uint32_t codes, __nv_bfloat162 factor) {
    uint32_t bits = (codes & 0x07u) << 6 | (codes & 0x08u) << 12 | (codes & 0x70u) << 18 |
                    (codes & 0x80u) << 24;
    auto value = *reinterpret_cast<__nv_bfloat162*>(&bits);
    value = __hmul2(__hmul2(value, __float2bfloat162_rn(0x1p126f)), factor);
    return *reinterpret_cast<uint32_t*>(&value);
  }
};

}  // namespace dsv4
