// One of the products of a gemm call.
#pragma once

#include <cstdint>

#include "dsv4/tiled.h"

namespace dsv4 {

DSV4_HOST_DEVICE constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kMaxGemmSegments = 8;

// One product x Wᵀ of the call. With several groups, equal runs of outputs read one group each.
struct GemmSegment {
  WeightFormat format;
  bool round_input;  // x to E4M3 and back, with a power-of-two scale per row and 128 inputs
  bool float_output;
  int32_t num_outputs;
  const uint8_t* codes;
  const uint8_t* scales;
  const float* global_scale;
  void* output;
};

}  // namespace dsv4
