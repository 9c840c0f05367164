// Rows of input as operands of tcgen05, in tiles that a stage of the product takes as they are.
//
// The rows of a block lie together. Of each input group and block of 128 columns follow two
// halves of 64 columns, each [rows, 128 bytes] with the 16-byte parts swizzled by the row's number;
// or one such array of E4M3 codes, then a word for each row with its scale byte four times.
#pragma once

#include "dsv4/decoded_plan_sm100.h"
#include "round_input.cuh"

namespace dsv4::sm100 {

// Blocks of consecutive rows: listed in memory, or without a list all rows as one group's.
struct RowBlocks {
  const RowBlock* list;
  const int32_t* count;
  int32_t num_rows;

  __device__ __forceinline__ int32_t Count(int32_t tile_rows) const {
    return list != nullptr ? *count : (num_rows + tile_rows - 1) / tile_rows;
  }
  __device__ __forceinline__ RowBlock At(int32_t index, int32_t tile_rows) const {
    if (list != nullptr) return list[index];
    int32_t first = index * tile_rows;
    return {0, first, min(tile_rows, num_rows - first), 0};
  }
};

// Where the tile of a row block, input group and block of columns begins.
__device__ __forceinline__ int64_t InputTileOffset(const RowBlock& rows, int32_t num_input_groups,
                                                   int32_t input_group, int32_t blocks_per_row,
                                                   int32_t column_block) {
  int64_t of_row = int64_t{num_input_groups} * blocks_per_row;
  int64_t in_block = int64_t{input_group} * blocks_per_row + column_block;
  return (rows.first_row * of_row + in_block * rows.num_rows) * kInputBytes;
}

// Of one of the two halves of a tile.
__device__ __forceinline__ int32_t PartOffset(int32_t row, int32_t part) {
  return row * 128 + (part ^ row % 8) * 16;
}

enum class Rounding : int32_t { kNone, kBfloat16, kCodes };

struct InputTiles {
  const uint16_t* x;             // bfloat16 [rows, groups, width]; null: the tiles hold them
  const int32_t* source_of_row;  // the row of x, or null: as they are
  uint8_t* tiles;
  RowBlocks rows;
  int32_t num_groups, width;
  Rounding rounding;
};

constexpr int32_t kInputThreads = 256, kThreadsPerRow = 16;

// A block for each (column block of a group, row block); sixteen lanes for 128 columns of a row.
template <int32_t kRows>
__global__ void __launch_bounds__(kInputThreads)
    MakeInputTiles(const __grid_constant__ InputTiles p) {
  constexpr int32_t kPasses = kRows * kThreadsPerRow / kInputThreads;
  if (blockIdx.y >= p.rows.Count(kRows)) return;
  const RowBlock rows = p.rows.At(blockIdx.y, kRows);
  const int32_t blocks_per_row = (p.width + kBlockColumns - 1) / kBlockColumns;
  const int32_t group = blockIdx.x / blocks_per_row, block = blockIdx.x % blocks_per_row;
  const int32_t lane = threadIdx.x % kThreadsPerRow, half = lane / 8;
  const int32_t column = block * kBlockColumns + lane * 8;
  uint8_t* tile = p.tiles + InputTileOffset(rows, p.num_groups, group, blocks_per_row, block);
  const auto row_of = [&](int32_t pass) {
    return static_cast<int32_t>(pass * kInputThreads + threadIdx.x) / kThreadsPerRow;
  };
  const auto part_of = [&](int32_t row) {
    return reinterpret_cast<uint4*>(tile + half * rows.num_rows * 128 + PartOffset(row, lane % 8));
  };

  uint4 values[kPasses];
#pragma unroll
  for (int32_t pass = 0; pass < kPasses; ++pass) {
    const int32_t row = row_of(pass);
    values[pass] = {};
    if (row >= rows.num_rows) continue;
    if (p.x == nullptr) {
      values[pass] = *part_of(row);
    } else if (column < p.width) {
      const int64_t of_row = rows.first_row + row;
      const int64_t source = p.source_of_row != nullptr ? p.source_of_row[of_row] : of_row;
      values[pass] = __ldg(reinterpret_cast<const uint4*>(
          p.x + (source * p.num_groups + group) * p.width + column));
    }
  }
  __syncthreads();  // codes overwrite other rows' values
#pragma unroll
  for (int32_t pass = 0; pass < kPasses; ++pass) {
    const int32_t row = row_of(pass);
    const uint4 v = values[pass];
    if (p.rounding == Rounding::kNone) {
      if (row < rows.num_rows) *part_of(row) = v;
      continue;
    }
    uint32_t amax = MaxMagnitude(MaxMagnitude(v.x, v.y), MaxMagnitude(v.z, v.w));
    amax = max(amax & 0xffffu, amax >> 16);
#pragma unroll
    for (int32_t distance = 1; distance < kThreadsPerRow; distance *= 2) {
      amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, distance));
    }
    const uint32_t scale = InputScale(amax);
    if (row >= rows.num_rows) continue;
    if (p.rounding == Rounding::kBfloat16) {
      *part_of(row) = {RoundInput(v.x, scale), RoundInput(v.y, scale), RoundInput(v.z, scale),
                       RoundInput(v.w, scale)};
      continue;
    }
    constexpr uint32_t kInOrder = 0x2031;
    const uint2 codes = {__byte_perm(InputCodes(v.x, v.y, scale), 0, kInOrder),
                         __byte_perm(InputCodes(v.z, v.w, scale), 0, kInOrder)};
    *reinterpret_cast<uint2*>(tile + PartOffset(row, lane / 2) + lane % 2 * 8) = codes;
    if (lane == 0) {
      reinterpret_cast<uint32_t*>(tile + rows.num_rows * 128)[row] = scale * 0x01010101u;
    }
  }
}

}  // namespace dsv4::sm100
