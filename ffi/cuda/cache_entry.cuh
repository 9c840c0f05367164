// Pieces of a cache entry in registers: rounding, rotation, encoding. A thread holds kCount
// consecutive channels, and 64 / kCount or 32 / kCount neighbouring lanes a group with one scale.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "dsv4/cache.h"

namespace dsv4 {

template <int kBytes>
struct BytesOf;
template <>
struct BytesOf<1> {
  using Type = uint8_t;
};
template <>
struct BytesOf<2> {
  using Type = uint16_t;
};
template <>
struct BytesOf<4> {
  using Type = uint32_t;
};
template <>
struct BytesOf<8> {
  using Type = uint2;
};
template <>
struct BytesOf<16> {
  using Type = uint4;
};

template <typename Word, int kWords>
__device__ __forceinline__ void StoreWords(uint8_t* target, const Word (&words)[kWords]) {
  using Vector = typename BytesOf<sizeof(words)>::Type;
  Vector vector;
  memcpy(&vector, words, sizeof(words));
  *reinterpret_cast<Vector*>(target) = vector;
}

__device__ __forceinline__ uint32_t PackBfloat16(float low, float high) {
  return BitCast<uint32_t>(__floats2bfloat162_rn(low, high));
}

__device__ __forceinline__ void UnpackBfloat16(uint4 packed, float (&x)[8]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

template <int kCount>
__device__ __forceinline__ void StoreBfloat16(uint8_t* target, const float (&x)[kCount]) {
  uint32_t words[kCount / 2];
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) words[i] = PackBfloat16(x[2 * i], x[2 * i + 1]);
  StoreWords(target, words);
}

__device__ __forceinline__ float RoundToBfloat16(float x) {
  return __bfloat162float(__float2bfloat16_rn(x));
}

template <int kCount>
__device__ __forceinline__ void RoundToBfloat16(float (&x)[kCount]) {
#pragma unroll
  for (float& value : x) value = RoundToBfloat16(value);
}

template <typename Word, int kWords>
__device__ __forceinline__ void LoadWords(const Word* source, Word (&words)[kWords]) {
  using Vector = typename BytesOf<sizeof(words)>::Type;
  const Vector vector = *reinterpret_cast<const Vector*>(source);
  memcpy(words, &vector, sizeof(words));
}

template <int kCount>
__device__ __forceinline__ void LoadWeight(const NormWeight& weight, int channel,
                                           float (&x)[kCount]) {
  constexpr int kStep = kCount < 4 ? kCount : 4;
#pragma unroll
  for (int i = 0; i < kCount; i += kStep) {
    float floats[kStep];
    uint16_t halves[kStep] = {};
    if (weight.is_float) {
      LoadWords(static_cast<const float*>(weight.values) + channel + i, floats);
    } else {
      LoadWords(static_cast<const uint16_t*>(weight.values) + channel + i, halves);
    }
#pragma unroll
    for (int j = 0; j < kStep; ++j) {
      x[i + j] = weight.is_float ? floats[j] : FromBfloat16(halves[j]);
    }
  }
}

struct Turn {
  float cosine, sine;
};

__device__ __forceinline__ Turn TurnAt(int position, float frequency) {
  Turn turn;
  sincosf(static_cast<float>(position) * frequency, &turn.sine, &turn.cosine);
  return turn;
}

// Rotates bfloat16 values; the results are rounded when they are stored.
template <int kPairs>
__device__ __forceinline__ void Rotate(float (&x)[2 * kPairs], const Turn (&turns)[kPairs]) {
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const float even = x[2 * j], odd = x[2 * j + 1];
    x[2 * j] = even * turns[j].cosine - odd * turns[j].sine;
    x[2 * j + 1] = even * turns[j].sine + odd * turns[j].cosine;
  }
}

template <int kLanes>
__device__ __forceinline__ float SumOfLanes(float x) {
#pragma unroll
  for (int lane = kLanes / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  return x;
}

// Of bits of magnitudes: as integers NaNs are above infinity and all numbers.
template <int kLanes>
__device__ __forceinline__ uint32_t MaxOfLanes(uint32_t bits) {
  if constexpr (kLanes == 32) {
    return __reduce_max_sync(~0u, bits);
  } else {
#pragma unroll
    for (int lane = kLanes / 2; lane > 0; lane /= 2) {
      bits = max(bits, __shfl_xor_sync(~0u, bits, lane));
    }
    return bits;
  }
}

template <int kCount>
__device__ __forceinline__ uint32_t AmaxBits(const float (&x)[kCount]) {
  uint32_t bits = 0;
#pragma unroll
  for (float value : x) bits = max(bits, __float_as_uint(value) & 0x7fffffffu);
  return bits;
}

__device__ __forceinline__ float AtLeast(float floor, uint32_t amax_bits) {
  return __uint_as_float(max(__float_as_uint(floor), amax_bits));
}

template <int kCount>
__device__ __forceinline__ void StoreE4m3(uint8_t* target, const float (&x)[kCount],
                                          float inverse) {
  uint16_t pairs[kCount / 2];
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    pairs[i] = __nv_cvt_float2_to_fp8x2(
        make_float2(x[2 * i] * inverse, x[2 * i + 1] * inverse), __NV_SATFINITE, __NV_E4M3);
  }
  StoreWords(target, pairs);
}

// Stores channels [channel, channel + kCount) of an entry of bfloat16 values to row `row` of the
// planes; all lanes of a warp call it. `amax_bits`, of the whole entry before the rotary channels,
// matters to kFloatScale only. Nothing is stored to a negative row.
template <EntryFormat kFormat, int kWidth, int kCount>
__device__ __forceinline__ void StoreEntry(const EntryPlanes& planes, int64_t row, int channel,
                                           const float (&x)[kCount], uint32_t amax_bits) {
  uint8_t* body = planes.body + row * BodyBytes(kFormat, kWidth);
  uint8_t* scales = planes.scales + row * ScaleBytes(kFormat, kWidth);
  if constexpr (kFormat == EntryFormat::kDense) {
    if (row >= 0) StoreBfloat16(body + 2 * channel, x);
  } else if constexpr (kFormat == EntryFormat::kMxfp4) {
    const uint32_t amax = MaxOfLanes<kKeyGroup / kCount>(AmaxBits(x));
    const uint32_t scale = ScaleE8m0(AtLeast(kKeyFloor, amax), 1.0f / kLargestE2m1);
    uint8_t codes[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      codes[i] = KeyCode(x[2 * i], scale) | KeyCode(x[2 * i + 1], scale) << 4;
    }
    if (row < 0) return;
    StoreWords(body + channel / 2, codes);
    if (channel % kKeyGroup == 0) scales[channel / kKeyGroup] = scale;
  } else {
    float inverse;
    if constexpr (kFormat == EntryFormat::kRecord) {
      const uint32_t amax = MaxOfLanes<kRecordGroup / kCount>(AmaxBits(x));
      const uint32_t scale = ScaleE8m0(AtLeast(kRecordFloor, amax), 1.0f / kLargestE4m3);
      inverse = InverseE8m0(scale);
      if (row >= 0 && channel % kRecordGroup == 0) {
        scales[channel / kRecordGroup] = channel < kNopeDim ? scale : 0;
      }
    } else {
      const float scale = AtLeast(kRecordFloor, amax_bits) * (1.0f / kLargestE4m3);
      inverse = __frcp_rn(scale);
      if (row >= 0 && channel == 0) *reinterpret_cast<float*>(scales) = scale;
    }
    if (row < 0) return;
    if (channel < kNopeDim) {
      StoreE4m3(body + channel, x, inverse);
    } else {
      StoreBfloat16(body + kNopeDim + 2 * (channel - kNopeDim), x);
    }
  }
}

}  // namespace dsv4
