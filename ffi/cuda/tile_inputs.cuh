// The kernel that copies inputs into tiles.
#pragma once

#include "gemm_input.cuh"

namespace dsv4 {

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

// A thread block copies a tile's 8 rows of so many blocks of 128 inputs, sixteen lanes each row.
constexpr int kInputThreads = 256, kInputBlocks = 4;
__global__ void __launch_bounds__(kInputThreads) TileInputs(const InputTiles p) {
  constexpr int kAtOnce = kInputThreads / 128, kTurns = kInputBlocks / kAtOnce;
  const int lane = threadIdx.x % 16, t = lane / 4, row_in_tile = threadIdx.x / 16 % 8;
  const int row_tile = blockIdx.x, row = row_tile * 8 + row_in_tile, group = blockIdx.z;
  const int first_block = blockIdx.y * kInputBlocks + threadIdx.x / 128;
  const uint16_t* x = p.x + (int64_t{row} * p.num_groups + group) * p.width;
  uint4 values[kTurns] = {};
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int column = (first_block + turn * kAtOnce) * kBlockColumns + lane * 8;
    if (row < p.num_rows && column < p.width) {
      values[turn] = __ldg(reinterpret_cast<const uint4*>(x + column));
    }
  }
  // Transposed, lane 4 t + u holds step 2 u + t / 2, inputs 2 (t % 2) + {0, 1} of all t.
  const int step = lane % 4 * 2 + t / 2, part = step % 4 * 2 + t % 2;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const uint4 v = values[turn];
    const int block = first_block + turn * kAtOnce;
    const bool inside = block < p.blocks_per_row;
    const int64_t block_of_all = int64_t{group} * p.blocks_per_row + block;
    const auto store = [&](uint8_t* copy, uint4 words) {
      const int64_t tile = (block_of_all * 2 + step / 4) * p.row_tiles + row_tile;
      TransposeWords(words, t);
      if (inside) {
        *reinterpret_cast<uint4*>(copy + tile * kTileBytes + row_in_tile * 128 +
                                  (part ^ row_in_tile) * 16) = words;
      }
    };
    if (p.plain != nullptr) store(p.plain, v);
    if (p.rounded == nullptr && p.codes == nullptr) continue;
    const uint32_t scale = ScaleOfShare(v);
    if (p.rounded != nullptr) {
      store(p.rounded, {RoundInput(v.x, scale), RoundInput(v.y, scale), RoundInput(v.z, scale),
                        RoundInput(v.w, scale)});
    }
    if (p.codes != nullptr) {
      StoreCodes({v, block_of_all, row, lane}, scale, p.row_tiles, inside, p.codes, p.scales);
    }
  }
}

}  // namespace dsv4
