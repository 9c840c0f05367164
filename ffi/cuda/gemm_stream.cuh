// Products with up to 16 rows of input: weights pass once from memory through shared memory into
// registers, where they are decoded for mma.sync.
//
// A unit is a run of warp tiles of outputs. A block of warps works on several units at a time, a
// tile; the warps of a unit take turns at its blocks of 128 inputs and add up at the end, in a
// fixed order. Each warp has a ring of its own that the copy engine fills, also ahead across tiles.
#pragma once

#include "dsv4/gemm_segment.h"
#include "round_input.cuh"
#include "tma.cuh"
#include "weight_tiles.cuh"

namespace dsv4 {

struct StreamSegment {
  GemmSegment gemm;
  int32_t outputs_per_group;
  int32_t first_tile;
};

struct StreamParams {
  const uint16_t* x;
  int32_t num_rows, row_stride, width;
  int32_t blocks_per_row;  // of weights
  int32_t num_tiles, num_segments;
  int32_t unit_warps_log2;
  StreamSegment segments[kMaxGemmSegments];
};

__device__ __forceinline__ void MmaBf16(float (&acc)[4], const Fragment& a, uint32_t b0,
                                        uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
}

// A lane's share of 128 inputs of token lane / 4: those of `weight_tiles.cuh`.
struct InputFragment {
  uint4 x[4];

  // From the address of the first; of them `num_inside` are inside the row.
  __device__ __forceinline__ void Load(const uint16_t* inputs, int num_inside) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i] = 8 * i < num_inside ? __ldg(reinterpret_cast<const uint4*>(inputs) + i) : uint4{};
    }
  }

  __device__ __forceinline__ void Round() {
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) amax = MaxMagnitude(amax, (&x[i / 4].x)[i % 4]);
    amax = max(amax & 0xffffu, amax >> 16);
    amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, 1));
    amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, 2));
    const uint32_t scale = InputScale(amax);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      (&x[i / 4].x)[i % 4] = RoundInput((&x[i / 4].x)[i % 4], scale);
    }
  }

  __device__ __forceinline__ uint32_t operator()(int step, int half) const {
    return (&x[step / 2].x)[step % 2 * 2 + half];
  }
};

template <WeightFormat format>
struct FormatConstant {
  static constexpr WeightFormat value = format;
};

constexpr int Largest(int x) { return x; }
template <typename... More>
constexpr int Largest(int x, More... more) {
  return x > Largest(more...) ? x : Largest(more...);
}

constexpr int Log2(int power) { return power == 1 ? 0 : 1 + Log2(power / 2); }

template <int kWarps, int kRowTiles, int kStages, int kTokenTiles, WeightFormat... formats>
struct StreamKernel {
  // Inputs for the next block are read ahead where registers allow.
  static constexpr bool kAhead = kTokenTiles == 1 || kWarps <= 8;
  static constexpr int kUnitRows = kRowTiles * kWarpTileRows, kTokens = 8 * kTokenTiles;
  static constexpr int kTileRowsLog2 = Log2(kWarps * kUnitRows);
  static constexpr int kCodeBytes = Largest(CodeBytes(formats)...) / kWarpTilesPerBlock * kRowTiles;
  // The one byte of an FP8 block is read where it lies.
  static constexpr int kScaleBytes =
      Largest(ScaleBytes(formats)...) / kWarpTilesPerBlock * kRowTiles;
  static constexpr int kStageBytes = kCodeBytes + kScaleBytes;
  // The padding puts what the lanes of a warp write into different banks.
  static constexpr int kTokenStride = kUnitRows + 4;
  static constexpr int kPartialFloats = kTokens * kTokenStride;

  struct Shared {
    alignas(128) uint8_t ring[kWarps][kStages][kStageBytes];
    float partial[kWarps][kPartialFloats];
    uint64_t full[kWarps][kStages];
  };

  using Accumulators = float[kRowTiles][kTokenTiles][4];

  template <typename Function>
  static __device__ __forceinline__ void WithFormat(WeightFormat format, Function&& function) {
    (void)((format == formats && (function(FormatConstant<formats>()), true)) || ...);
  }

  // Bytes of a warp tile.
  struct Parts {
    int codes, scales;
  };
  static DSV4_HOST_DEVICE constexpr Parts PartsOf(WeightFormat format) {
    return {CodeBytes(format) / kWarpTilesPerBlock, ScaleBytes(format) / kWarpTilesPerBlock};
  }

  // A warp's share of a tile: blocks of 128 inputs at a fixed stride.
  struct Unit {
    int segment, row;
    int64_t first_block;  // of the weight, in its order in memory
    bool has_rows;

    __device__ __forceinline__ WeightFormat Format(const StreamParams& p) const {
      return p.segments[segment].gemm.format;
    }
  };

  static __device__ __forceinline__ Unit UnitOf(const StreamParams& p, int tile, int warp) {
    Unit unit;
    unit.segment = 0;
    while (unit.segment + 1 < p.num_segments && tile >= p.segments[unit.segment + 1].first_tile) {
      ++unit.segment;
    }
    const int first_unit =
        (tile - p.segments[unit.segment].first_tile) * kWarps >> p.unit_warps_log2;
    unit.row = (first_unit + (warp >> p.unit_warps_log2)) * kUnitRows;
    unit.has_rows = unit.row < p.segments[unit.segment].gemm.num_outputs;
    unit.first_block =
        int64_t{unit.row / kBlockRows} * p.blocks_per_row + (warp & ((1 << p.unit_warps_log2) - 1));
    return unit;
  }

  // The share as copies into the ring: lane 0 makes those of codes, lane 1 those of scales, except
  // of FP8 blocks, whose one byte is read where it lies.
  struct Copies {
    const uint8_t* source;
    int segment;
    bool has_rows;

    __device__ __forceinline__ Copies(const StreamParams& p, const Unit& unit, int lane)
        : segment(unit.segment), has_rows(unit.has_rows) {
      WithFormat(unit.Format(p), [&](auto format) {
        constexpr Parts parts = PartsOf(decltype(format)::value);
        const GemmSegment& gemm = p.segments[unit.segment].gemm;
        source = lane == 0 ? gemm.codes : gemm.scales;
        source += (unit.first_block * kWarpTilesPerBlock + unit.row % kBlockRows / kWarpTileRows) *
                  (lane == 0 ? parts.codes : parts.scales);
      });
    }

    __device__ __forceinline__ void Next(const StreamParams& p, int lane, uint8_t* stage,
                                         uint64_t* full) {
      WithFormat(p.segments[segment].gemm.format, [&](auto format) {
        constexpr Parts parts = PartsOf(decltype(format)::value);
        if (lane == 0) {
          ArriveExpectingBytes(full, has_rows ? (parts.codes + parts.scales) * kRowTiles : 0);
        }
        const int part = lane == 0 ? parts.codes : parts.scales;
        if (has_rows && lane < (parts.scales == 0 ? 1 : 2)) {
          LoadBulk(stage + lane * kCodeBytes, source, part * kRowTiles, full);
        }
        source += kWarpTilesPerBlock * part << p.unit_warps_log2;
      });
    }
  };

  template <WeightFormat format>
  static __device__ __forceinline__ void Multiply(const uint8_t* stage, const uint8_t* block_scale,
                                                  const InputFragment (&b)[kTokenTiles], int lane,
                                                  Accumulators& acc) {
    using Tiles = WeightTiles<format>;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const auto raw = Tiles::LoadScale(
          format == WeightFormat::kFp8Block ? block_scale : stage + kCodeBytes, r, lane);
#pragma unroll
      for (int c = 0; c < NumChunks(format); ++c) {
        const uint4 chunk = *reinterpret_cast<const uint4*>(
            stage + (r * NumChunks(format) + c) * kChunkBytes + lane * 16);
        const RowScales scales = Tiles::Scales(raw, c);
#pragma unroll
        for (int s = 0; s < Tiles::kStepsPerChunk; ++s) {
          const Fragment a = Tiles::Decode(chunk, s, scales);
          const int step = c * Tiles::kStepsPerChunk + s;
#pragma unroll
          for (int t = 0; t < kTokenTiles; ++t) MmaBf16(acc[r][t], a, b[t](step, 0), b[t](step, 1));
        }
      }
    }
  }

  static __device__ __forceinline__ float Unscale(WeightFormat format) {
    float unscale = 1;
    WithFormat(format, [&](auto f) { unscale = WeightTiles<decltype(f)::value>::kUnscale; });
    return unscale;
  }

  // What a warp reads directly for one block of inputs.
  struct Inputs {
    InputFragment b[kTokenTiles];
    uint8_t block_scale;
  };

  static __device__ __forceinline__ void Run(const StreamParams& p) {
    extern __shared__ __align__(128) uint8_t stream_shared[];
    Shared& shared = *reinterpret_cast<Shared*>(stream_shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_block = warp & ((1 << p.unit_warps_log2) - 1);
    const int block_stride = 1 << p.unit_warps_log2;
    const int num_blocks = (p.blocks_per_row - first_block + block_stride - 1) >> p.unit_warps_log2;

    // Of what the ring is filled with next.
    int copied_tile = blockIdx.x, copies_left = num_blocks;
    Copies copies(p, UnitOf(p, copied_tile, warp), lane);
    RingPosition<kStages> to, from;
    const auto copy_next = [&] {
      if (copies_left <= 0) return;
      copies.Next(p, lane, shared.ring[warp][to.slot], &shared.full[warp][to.slot]);
      to.Advance();
      if (--copies_left == 0 && copied_tile + static_cast<int>(gridDim.x) < p.num_tiles) {
        copied_tile += gridDim.x;
        copies_left = num_blocks;
        copies = Copies(p, UnitOf(p, copied_tile, warp), lane);
      }
    };
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < kStages; ++i) InitBarrier(&shared.full[warp][i], 1);
      FenceBarrierInit();
    }
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) copy_next();

    for (int tile = blockIdx.x; tile < p.num_tiles; tile += gridDim.x) {
      const Unit unit = UnitOf(p, tile, warp);
      const WeightFormat format = unit.Format(p);
      const bool round = p.segments[unit.segment].gemm.round_input;
      const float global_scale = __ldg(p.segments[unit.segment].gemm.global_scale);
      int group = 0;
      if (p.row_stride != p.width) group = unit.row / p.segments[unit.segment].outputs_per_group;
      int input =
          group * p.width + first_block * kBlockColumns + lane / 4 * p.row_stride + lane % 4 * 32;
      int num_inside = p.width - first_block * kBlockColumns - lane % 4 * 32;
      const uint8_t* block_scale = p.segments[unit.segment].gemm.scales + unit.first_block;
      const auto load = [&](Inputs& inputs) {
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          inputs.b[t].Load(p.x + (input + 8 * t * p.row_stride),
                           8 * t + lane / 4 < p.num_rows ? num_inside : 0);
        }
        if (format == WeightFormat::kFp8Block && unit.has_rows) {
          inputs.block_scale = __ldg(block_scale);
          block_scale += block_stride;
        }
        input += block_stride * kBlockColumns;
        num_inside -= block_stride * kBlockColumns;
      };
      Accumulators acc = {};
      Inputs next;
      if (kAhead && num_blocks > 0) load(next);
      for (int left = num_blocks; left > 0; --left) {
        if constexpr (!kAhead) load(next);
        Inputs inputs = next;
        if (kAhead && left > 1) load(next);
        if (round) {
#pragma unroll
          for (int t = 0; t < kTokenTiles; ++t) inputs.b[t].Round();
        }
        WaitBarrier(&shared.full[warp][from.slot], from.parity);
        if (unit.has_rows) {
          WithFormat(format, [&](auto f) {
            Multiply<decltype(f)::value>(shared.ring[warp][from.slot], &inputs.block_scale,
                                         inputs.b, lane, acc);
          });
        }
        from.Advance();
        __syncwarp();
        copy_next();
      }
      float* partial = shared.partial[warp];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            partial[(8 * t + lane % 4 * 2 + i % 2) * kTokenStride + r * kWarpTileRows + lane / 4 +
                    i / 2 * 8] = acc[r][t][i];
          }
        }
      }
      __syncthreads();
      Finish(p, unit.segment, tile, global_scale * Unscale(format), shared);
      __syncthreads();
    }
  }

  // Adds up the partial sums of the warps and writes the tile.
  static __device__ __forceinline__ void Finish(const StreamParams& p, int segment, int tile,
                                                float factor, Shared& shared) {
    const GemmSegment& gemm = p.segments[segment].gemm;
    const int unit_warps = 1 << p.unit_warps_log2;
    const int rows_log2 = kTileRowsLog2 - p.unit_warps_log2, rows = 1 << rows_log2;
    const int first_row = (tile - p.segments[segment].first_tile) * rows;
    for (int i = threadIdx.x; i < rows * p.num_rows; i += kWarps * 32) {
      const int row = i & (rows - 1), token = i >> rows_log2;
      if (first_row + row >= gemm.num_outputs) continue;
      float sum = 0;
      for (int w = 0; w < unit_warps; ++w) {
        sum +=
            shared
                .partial[row / kUnitRows * unit_warps + w][token * kTokenStride + row % kUnitRows];
      }
      const int64_t index = int64_t{token} * gemm.num_outputs + first_row + row;
      if (gemm.float_output) {
        static_cast<float*>(gemm.output)[index] = sum * factor;
      } else {
        static_cast<uint16_t*>(gemm.output)[index] = ToBfloat16(sum * factor);
      }
    }
  }
};

template <int kWarps, int kRowTiles, int kStages, int kTokenTiles, WeightFormat... formats>
__global__ void __launch_bounds__(kWarps * 32, 1)
    StreamGemm(const __grid_constant__ StreamParams params) {
  StreamKernel<kWarps, kRowTiles, kStages, kTokenTiles, formats...>::Run(params);
}

}  // namespace dsv4
