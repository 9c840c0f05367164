// Inputs copied into the tiles in which warpgroup products read them from shared memory.
//
// A tile is 8 rows of 128 bytes, their 16-byte parts swizzled by the row's number: 64 bfloat16
// inputs, or 128 E4M3 codes. Tiles of the same inputs follow each other. Within 128 inputs the
// order is that of tiled weights: bfloat16 position 16 s + 2 t + {0, 1, 8, 9} holds input
// 32 t + 4 s + {0, 1, 2, 3}, code position 16 s + 4 t + {1, 3, 0, 2} holds the same.
#pragma once

#include "dsv4/gemm_segment.h"
#include "round_input.cuh"

namespace dsv4 {

constexpr int kTileBytes = 1024;

// Eight inputs of a row for each of sixteen lanes.
struct InputShare {
  uint4 values;
  int64_t block;  // of 128 inputs, of all groups
  int row, lane;
};

__device__ __forceinline__ uint32_t ScaleOfShare(uint4 values) {
  uint32_t amax = MaxMagnitude(MaxMagnitude(values.x, values.y), MaxMagnitude(values.z, values.w));
  amax = max(amax & 0xffffu, amax >> 16);
#pragma unroll
  for (int distance = 1; distance < 16; distance *= 2) {
    amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, distance));
  }
  return InputScale(amax);
}

// By all lanes of a warp, of which those that are not `inside` store nothing.
__device__ __forceinline__ void StoreCodes(const InputShare& share, uint32_t scale, int row_tiles,
                                           bool inside, uint8_t* codes, float* scales) {
  const uint4 values = share.values;
  const int t = share.lane / 4, row_in_tile = share.row % 8;
  // The words of steps 2 u and 2 u + 1 of lane 4 t + u. Lanes of even t take the first of two
  // lanes, the others the second.
  const uint2 words = {InputCodes(values.x, values.y, scale),
                       InputCodes(values.z, values.w, scale)};
  const uint32_t received = __shfl_xor_sync(0xffffffffu, t % 2 ? words.x : words.y, 4);
  const int step = share.lane % 4 * 2 + t % 2;
  if (!inside) return;
  const int64_t tile = share.block * row_tiles + share.row / 8;
  *reinterpret_cast<uint2*>(codes + tile * kTileBytes + row_in_tile * 128 +
                            (step ^ row_in_tile) * 16 + t / 2 * 8) =
      t % 2 ? uint2{received, words.y} : uint2{words.x, received};
  if (share.lane == 0) scales[share.block * row_tiles * 8 + share.row] = DecodeE8m0(scale);
}

}  // namespace dsv4
