// The dense router of many tokens: the gate's product in tiles, then the selection.
#pragma once

#include <cuda_runtime.h>

#include "dsv4/ffi.h"

namespace dsv4 {

struct TiledRouterCall {
  const uint16_t *x, *gate;  // [num_tokens, width], [num_experts, width] bfloat16
  const float* bias;
  int num_tokens, width, num_experts, top_k;
  float scale;
  float* sums;  // [num_slices, num_tokens, pitch], what blocks leave for the selection
  int num_slices;  // of the width
  int64_t pitch;   // at least num_experts, a multiple of 4
  float* weights;
  int32_t* ids;
};

ffi::Error LaunchTiledRouter(cudaStream_t stream, const TiledRouterCall& call);

}  // namespace dsv4
