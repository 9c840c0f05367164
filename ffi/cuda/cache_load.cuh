// Entries of 448 + 64 channels as bfloat16.
#pragma once

#include "cache_entry.cuh"

namespace dsv4 {

// Eight channels of an entry, from `channel` on.
template <EntryFormat kFormat>
__device__ __forceinline__ uint4 LoadChannels(const uint8_t* body, const uint8_t* scales,
                                              int channel) {
  if (kFormat == EntryFormat::kDense) return *reinterpret_cast<const uint4*>(body + 2 * channel);
  if (channel >= kNopeDim) {
    return *reinterpret_cast<const uint4*>(body + kNopeDim + 2 * (channel - kNopeDim));
  }
  const uint2 codes = *reinterpret_cast<const uint2*>(body + channel);
  const float scale = kFormat == EntryFormat::kFloatScale
                          ? *reinterpret_cast<const float*>(scales)
                          : DecodeE8m0(scales[channel / kRecordGroup]);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t pair = (i < 2 ? codes.x : codes.y) >> (16 * (i % 2)) & 0xffffu;
    const __half2 halves = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3);
    const float2 values = __half22float2(halves);
    words[i] = PackBfloat16(values.x * scale, values.y * scale);
  }
  return {words[0], words[1], words[2], words[3]};
}

}  // namespace dsv4
