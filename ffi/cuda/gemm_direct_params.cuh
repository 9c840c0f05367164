// What gemm's kernel for up to 64 rows multiplies, and where its outputs go.
#pragma once

#include "dsv4/gemm_segment.h"

namespace dsv4 {

struct DirectSegment {
  GemmSegment gemm;
  int32_t outputs_per_group;
  int32_t first_tile;
};

constexpr int kMaxDirectParts = kNumWeightFormats, kMaxDirectTokens = 64;

struct DirectParams {
  const uint16_t* x;
  int32_t num_rows, row_stride, width;
  int32_t blocks_per_row;   // of weights
  int32_t ranks_log2;       // blocks of a cluster
  int32_t unit_warps_log2;  // warps that take turns at a unit
  int32_t max_blocks;       // of inputs in shared memory
  int32_t part_log2;        // blocks of inputs that are waited for together
  int32_t groups_log2;      // of as many rows of input as the kernel takes at a time
  // The segments of each of the kernel's formats, and the clusters that multiply them.
  struct Part {
    int32_t first_segment, end_segment, num_tiles, first_cluster, num_clusters;
  } parts[kMaxDirectParts];
  DirectSegment segments[kMaxGemmSegments];
};

// Four of a token, from `row` on; those beyond the last output are not written.
__device__ __forceinline__ void WriteOutputs(const GemmSegment& gemm, int token, int row,
                                             float4 sums) {
  const int64_t index = int64_t{token} * gemm.num_outputs + row;
  const bool together = gemm.num_outputs % 4 == 0;
  if (gemm.float_output) {
    float* output = static_cast<float*>(gemm.output) + index;
    if (together) {
      *reinterpret_cast<float4*>(output) = sums;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (row + i < gemm.num_outputs) output[i] = (&sums.x)[i];
      }
    }
  } else {
    uint16_t* output = static_cast<uint16_t*>(gemm.output) + index;
    if (together) {
      *reinterpret_cast<uint2*>(output) = {
          ToBfloat16(sums.x) | uint32_t{ToBfloat16(sums.y)} << 16,
          ToBfloat16(sums.z) | uint32_t{ToBfloat16(sums.w)} << 16};
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (row + i < gemm.num_outputs) output[i] = ToBfloat16((&sums.x)[i]);
      }
    }
  }
}

}  // namespace dsv4
