// One entry of a cache: normalised, rotated, encoded.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "dsv4/cache.h"

namespace dsv4 {

inline float RoundToBfloat16(float x) { return FromBfloat16(ToBfloat16(x)); }

inline float InverseRms(const float* x, int width, float eps) {
  double sum = 0.0;
  for (int i = 0; i < width; ++i) sum += static_cast<double>(x[i]) * x[i];
  return 1.0f / std::sqrt(static_cast<float>(sum) / width + eps);
}

// Rotates the last channels, rounded to bfloat16.
inline void Rotate(float* x, int width, int position, const float* frequencies) {
  float* pair = x + width - kRopeDim;
  for (int j = 0; j < kRopePairs; ++j, pair += 2) {
    const float angle = static_cast<float>(position) * frequencies[j];
    const float cosine = std::cos(angle), sine = std::sin(angle), even = pair[0], odd = pair[1];
    pair[0] = RoundToBfloat16(even * cosine - odd * sine);
    pair[1] = RoundToBfloat16(even * sine + odd * cosine);
  }
}

inline void NormalizeAndRotate(float* x, int width, const NormWeight& weight, float eps,
                               int position, const float* frequencies) {
  const float scale = InverseRms(x, width, eps);
  for (int i = 0; i < width; ++i) x[i] = RoundToBfloat16(x[i] * scale * weight[i]);
  Rotate(x, width, position, frequencies);
}

// x H / sqrt(width), H[i][j] = (-1)^popcount(i & j), rounded to bfloat16.
inline void Hadamard(float* x, int width) {
  for (int stride = 1; stride < width; stride *= 2) {
    for (int i = 0; i < width; ++i) {
      if (i & stride) continue;
      const float a = x[i], b = x[i + stride];
      x[i] = a + b;
      x[i + stride] = a - b;
    }
  }
  const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(width)));
  for (int i = 0; i < width; ++i) x[i] = RoundToBfloat16(x[i] * factor);
}

inline float Amax(const float* x, int count) {
  uint32_t bits = 0;  // As integers NaNs are above infinity and all numbers.
  for (int i = 0; i < count; ++i) bits = std::max(bits, BitCast<uint32_t>(x[i]) & 0x7fffffffu);
  return BitCast<float>(bits);
}

// max(amax, floor), NaN if amax is.
inline float AtLeast(float floor, float amax) { return amax < floor ? floor : amax; }

// Writes an entry of bfloat16 values to row `row` of the planes.
inline void EncodeEntry(const float* x, int width, const EntryPlanes& planes, int64_t row) {
  uint8_t* body = planes.body + row * BodyBytes(planes.format, width);
  uint8_t* scales = planes.scales + row * ScaleBytes(planes.format, width);
  auto store_bfloat16 = [&](uint8_t* target, int first) {
    for (int i = first; i < width; ++i, target += 2) {
      const uint16_t bits = ToBfloat16(x[i]);
      std::memcpy(target, &bits, 2);
    }
  };
  if (planes.format == EntryFormat::kDense) return store_bfloat16(body, 0);
  if (planes.format == EntryFormat::kMxfp4) {
    for (int group = 0; group < width / kKeyGroup; ++group) {
      const float* values = x + group * kKeyGroup;
      const float amax = AtLeast(kKeyFloor, Amax(values, kKeyGroup));
      scales[group] = ScaleE8m0(amax, 1.0f / kLargestE2m1);
      for (int i = 0; i < kKeyGroup; i += 2, ++body) {
        *body = KeyCode(values[i], scales[group]) | KeyCode(values[i + 1], scales[group]) << 4;
      }
    }
    return;
  }
  if (planes.format == EntryFormat::kRecord) {
    scales[kRecordScaleBytes - 1] = 0;
    for (int group = 0; group < kRecordGroups; ++group) {
      const float* values = x + group * kRecordGroup;
      const float amax = AtLeast(kRecordFloor, Amax(values, kRecordGroup));
      scales[group] = ScaleE8m0(amax, 1.0f / kLargestE4m3);
      const float inverse = InverseE8m0(scales[group]);
      for (int i = 0; i < kRecordGroup; ++i) {
        body[group * kRecordGroup + i] = EncodeE4m3(values[i] * inverse);
      }
    }
  } else {
    const float scale = AtLeast(kRecordFloor, Amax(x, kNopeDim)) * (1.0f / kLargestE4m3);
    const float inverse = 1.0f / scale;
    std::memcpy(scales, &scale, sizeof(scale));
    for (int i = 0; i < kNopeDim; ++i) body[i] = EncodeE4m3(x[i] * inverse);
  }
  store_bfloat16(body + kNopeDim, kNopeDim);
}

// The entry in row `row` of the planes, in bfloat16.
inline void DecodeEntry(const EntryPlanes& planes, int64_t row, uint16_t* out) {
  const uint8_t* body = planes.body + row * BodyBytes(planes.format, kHeadDim);
  const uint8_t* scales = planes.scales + row * ScaleBytes(planes.format, kHeadDim);
  if (planes.format == EntryFormat::kDense) {
    std::memcpy(out, body, 2 * kHeadDim);
    return;
  }
  for (int i = 0; i < kNopeDim; ++i) {
    float scale;
    if (planes.format == EntryFormat::kFloatScale) {
      std::memcpy(&scale, scales, sizeof(scale));
    } else {
      scale = DecodeE8m0(scales[i / kRecordGroup]);
    }
    out[i] = ToBfloat16(DecodeE4m3(body[i]) * scale);
  }
  std::memcpy(out + kNopeDim, body + kNopeDim, 2 * kRopeDim);
}

}  // namespace dsv4
