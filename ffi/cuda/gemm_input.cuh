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

struct InputTiles {
  const uint16_t* x;
  int32_t num_rows, num_groups, width;
  int32_t blocks_per_row;  // of 128 inputs
  int32_t row_tiles;       // of 8 rows
  // Copies to make, or null.
  uint8_t* plain;
  uint8_t* rounded;
  uint8_t* codes;
  float* scales;  // of the codes, [groups, blocks of 128 inputs, rows]
};

// Four lanes whose numbers differ in bits 2 and 3 transpose a 4 x 4 matrix of words.
__device__ __forceinline__ void TransposeWords(uint4& words, int row) {
  uint32_t(&w)[4] = reinterpret_cast<uint32_t(&)[4]>(words);
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    uint32_t received = __shfl_xor_sync(0xffffffffu, row & 1 ? w[i] : w[i + 1], 4);
    (row & 1 ? w[i] : w[i + 1]) = received;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t received = __shfl_xor_sync(0xffffffffu, row & 2 ? w[i] : w[i + 2], 8);
    (row & 2 ? w[i] : w[i + 2]) = received;
  }
}

// Sixteen lanes copy 128 inputs of a row.
constexpr int kInputThreads = 256;
__global__ void __launch_bounds__(kInputThreads) TileInputs(const InputTiles p) {
  const int64_t item = (int64_t{blockIdx.x} * kInputThreads + threadIdx.x) / 16;
  const int lane = threadIdx.x % 16, t = lane / 4;
  const int block = item % p.blocks_per_row;
  const int64_t rest = item / p.blocks_per_row;
  const int group = rest % p.num_groups;
  const int64_t row = rest / p.num_groups;
  const bool inside = row < int64_t{p.row_tiles} * 8;
  const int column = block * kBlockColumns + lane * 8;
  uint4 values = {};
  if (row < p.num_rows && column < p.width) {
    values = __ldg(
        reinterpret_cast<const uint4*>(p.x + (row * p.num_groups + group) * p.width + column));
  }
  // Transposed, lane 4 t + u holds step 2 u + t / 2, inputs 2 (t % 2) + {0, 1} of all t.
  const int step = lane % 4 * 2 + t / 2, part = step % 4 * 2 + t % 2;
  const int64_t tile =
      ((int64_t{group} * p.blocks_per_row + block) * 2 + step / 4) * p.row_tiles + row / 8;
  const int64_t offset = tile * kTileBytes + row % 8 * 128 + (part ^ row % 8) * 16;
  const auto store = [&](uint8_t* copy, uint4 words) {
    TransposeWords(words, t);
    if (inside) *reinterpret_cast<uint4*>(copy + offset) = words;
  };
  if (p.plain != nullptr) store(p.plain, values);
  if (p.rounded == nullptr && p.codes == nullptr) return;
  uint32_t amax = MaxMagnitude(MaxMagnitude(values.x, values.y), MaxMagnitude(values.z, values.w));
  amax = max(amax & 0xffffu, amax >> 16);
#pragma unroll
  for (int distance = 1; distance < 16; distance *= 2) {
    amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, distance));
  }
  const uint32_t scale = InputScale(amax);
  if (p.rounded != nullptr) {
    store(p.rounded, {RoundInput(values.x, scale), RoundInput(values.y, scale),
                      RoundInput(values.z, scale), RoundInput(values.w, scale)});
  }
  if (p.codes == nullptr) return;
  // The words of steps 2 u and 2 u + 1. Lanes of even t take the first of two lanes, the others the
  // second.
  const uint2 words = {InputCodes(values.x, values.y, scale),
                       InputCodes(values.z, values.w, scale)};
  const uint32_t received = __shfl_xor_sync(0xffffffffu, t % 2 ? words.x : words.y, 4);
  const int code_step = lane % 4 * 2 + t % 2;
  const int64_t code_tile = (int64_t{group} * p.blocks_per_row + block) * p.row_tiles + row / 8;
  if (!inside) return;
  *reinterpret_cast<uint2*>(p.codes + code_tile * kTileBytes + row % 8 * 128 +
                            (code_step ^ row % 8) * 16 + t / 2 * 8) =
      t % 2 ? uint2{received, words.y} : uint2{words.x, received};
  if (lane == 0) {
    p.scales[(int64_t{group} * p.blocks_per_row + block) * p.row_tiles * 8 + row] =
        DecodeE8m0(scale);
  }
}

}  // namespace dsv4
