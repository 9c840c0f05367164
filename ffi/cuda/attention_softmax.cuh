// What the kernels of attention do with a logit and with an output.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dsv4 {

constexpr float kLog2e = 1.4426950408889634f;
constexpr unsigned kAllLanes = 0xffffffffu;

// cos and sin of the angle, one float32 product as everywhere; reduced in float64 because float32
// loses the turn's fraction far from position 0.
__device__ __forceinline__ float2 Rotation(int position, float frequency) {
  constexpr double kTurnsPerRadian = 0.15915494309189535;
  double turns = static_cast<double>(static_cast<float>(position) * frequency) * kTurnsPerRadian;
  float2 rotation;
  sincospif(2.0f * static_cast<float>(turns - rint(turns)), &rotation.y, &rotation.x);
  return rotation;
}

// Rounded in the same way wherever it is inlined.
__device__ __forceinline__ float2 RotateBack(float2 pair, float2 rotation) {
  return {fmaf(pair.x, rotation.x, pair.y * rotation.y),
          fmaf(pair.y, rotation.x, -pair.x * rotation.y)};
}

__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t PackBf16x2(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// What the peak of logits is subtracted as: without any logit there is none.
__device__ __forceinline__ float Base(float peak) { return peak == -INFINITY ? 0.0f : peak; }

// 1 / (sum + exp(sink)), relative to the base; 0 for a head that sees nothing.
__device__ __forceinline__ float Normaliser(float sum, float peak, float sink) {
  return sum == 0.0f ? 0.0f : __fdividef(1.0f, sum + Exp2(sink * kLog2e - Base(peak)));
}

}  // namespace dsv4
