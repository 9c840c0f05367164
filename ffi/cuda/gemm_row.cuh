// Products with one row of input, in few instructions: such a launch waits for these, and for
// latencies, as long as for weights.
//
// A block of threads multiplies some units, warp tiles of 16 outputs, of one weight. Warps share
// the blocks of 128 inputs out among themselves: a warp rounds the inputs of one and passes over
// its units with it before it takes the next. Partial sums meet in shared memory and are added up
// in a fixed order.
#pragma once

#include "dsv4/gemm_segment.h"
#include "round_input.cuh"
#include "scaled_sums.cuh"
#include "warp_products.cuh"

namespace dsv4 {

// In the program's order, in which it is not behind the weights.
__device__ __forceinline__ uint2 LoadPairs(const uint16_t* from) {
  uint2 pairs;
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(pairs.x), "=r"(pairs.y) : "l"(from));
  return pairs;
}

// Inputs of bfloat16 weights are not rounded.
struct RowSegment {
  GemmSegment gemm;
  int32_t outputs_per_group;
  int32_t first_block;   // of threads, in a group
  int32_t k_warps_log2;  // warps that share a unit's inputs
  int32_t units_log2;    // of a warp, up to those of 64 outputs
};

// A row of blocks of threads for each group.
struct RowParams {
  const uint16_t* x;
  int32_t width;
  int32_t blocks_per_row;  // of weights
  int32_t num_segments;
  RowSegment segments[kMaxGemmSegments];
};

// A warp's own.
struct RowInputs {
  uint4 steps[kStepsPerBlock / 2][4];  // two steps of inputs of lanes 4 g + t
  uint4 zeros[kStepsPerBlock / 2][4];
};

constexpr int RowSharedBytes(int warps_log2, int units_log2) {
  return (static_cast<int>(sizeof(RowInputs)) + (kWarpTileRows * 4 << units_log2)) << warps_log2;
}

template <int kWarpsLog2, WeightFormat format, bool kRound>
struct RowKernel {
  // FP8 weights meet inputs as float16. FP4 weights meet them as codes whose sums are scaled, a
  // column for each lane of a quad.
  static constexpr bool kHalves = format == WeightFormat::kFp8Block;
  static constexpr bool kIsFp4 = NumChunks(format) == 2;
  static constexpr int kUnits = kIsFp4 ? 2 : 1;  // of a turn
  static constexpr int kUnitBytes = CodeBytes(format) / kWarpTilesPerBlock;

  // Of bfloat16 weights there are none.
  using Scales = SumScales<format == WeightFormat::kBf16 ? WeightFormat::kFp8Block : format>;

  // What a warp reads, turn by turn.
  struct Weights {
    uint4 chunks[kUnits][NumChunks(format)];
    Scales scales[kUnits];
    const uint8_t *codes, *unit_scales;  // the lane's
    uint32_t unit;                       // of the weight, in the order in which it is stored
    int turns_left, turns_of_block_left;

    // `next_block` is how many units it is from behind the last of a block to the next block.
    __device__ __forceinline__ void Load(int turns_of_block, int next_block) {
      if (--turns_left < 0) return;
      const uint8_t* from = codes + uint64_t{unit} * kUnitBytes;
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
#pragma unroll
        for (int j = 0; j < NumChunks(format); ++j) {
          chunks[i][j] = LoadStreamed(from + i * kUnitBytes + j * kChunkBytes);
        }
        if constexpr (format == WeightFormat::kFp8Block) {
          scales[i].raw = __ldg(unit_scales + unit / kWarpTilesPerBlock);
        } else if constexpr (kIsFp4) {
          scales[i] = reinterpret_cast<const Scales*>(unit_scales)[(unit + i) * 16];
        }
      }
      unit += kUnits;
      if (--turns_of_block_left > 0) return;
      turns_of_block_left = turns_of_block;
      unit += next_block;
    }
  };

  // Four bfloat16 values times `factor` as float16, in the order 2, 0, 3, 1 of tiled FP8 weights.
  static __device__ __forceinline__ uint2 ToHalves(uint2 pairs, float factor) {
    constexpr uint32_t kUpper = 0xffff0000u;
    const auto pair = [&](uint32_t low, uint32_t high) {
      uint32_t halves;
      asm("cvt.rn.f16x2.f32 %0, %1, %2;"
          : "=r"(halves)
          : "f"(__uint_as_float(high) * factor), "f"(__uint_as_float(low) * factor));
      return halves;
    };
    return {pair(pairs.y << 16, pairs.x << 16), pair(pairs.y & kUpper, pairs.x & kUpper)};
  }

  static __device__ __forceinline__ void StoreInputs(RowInputs& to, uint2 pairs, float& scale) {
    if constexpr (kRound || kHalves) {
      const uint32_t both = MaxMagnitude(pairs.x, pairs.y);
      const uint32_t amax = __reduce_max_sync(0xffffffffu, max(both & 0xffffu, both >> 16));
      if constexpr (kRound) {
        const uint32_t byte = InputScale(amax);
        if constexpr (kHalves) {
          pairs = HalvesOfCodes(InputCodes(pairs.x, pairs.y, byte));
          scale = DecodeE8m0(byte);
        } else {
          pairs = {RoundInput(pairs.x, byte), RoundInput(pairs.y, byte)};
        }
      } else {
        // The largest gets float16's largest exponent: exact down to 2^-29 of it.
        const uint32_t exponent = max(amax >> 7, 15u);
        const float inverse = __uint_as_float((268 - exponent) << 23);
        scale = __uint_as_float((exponent - 14) << 23);
        pairs = ToHalves(pairs, inverse);
      }
    }
    if constexpr (kIsFp4) pairs = ScaleInputs(pairs);
    const int lane = threadIdx.x % 32, step = lane % 8;
    __syncwarp();
    reinterpret_cast<uint2*>(&to.steps[step / 2][lane / 8])[step % 2] = pairs;
    __syncwarp();
  }

  // Of outputs g and g + 8 in lanes 4 g. After the last unit's products `load` may overwrite the
  // weights.
  template <typename Load>
  static __device__ __forceinline__ float2 Multiply(const Weights& weights, int unit,
                                                    const uint4 (*inputs)[4], float input_scale,
                                                    Load load) {
    const uint4(&chunks)[NumChunks(format)] = weights.chunks[unit];
    if constexpr (kIsFp4) {
      float sums[2] = {};
      AddScaledProducts<format>(sums, chunks, weights.scales[unit],
                                [&](int part) { return inputs[part][0]; });
      if (unit == kUnits - 1) load();
#pragma unroll
      for (float& sum : sums) sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      return {sums[0], sums[1]};
    } else {
      // Two chains of products, which take turns; of bfloat16 as registers allow.
      constexpr int kChains = kHalves ? 2 : 1;
      float acc[kChains][4] = {};
#pragma unroll
      for (int part = 0; part < kStepsPerBlock / 2; ++part) {
        const uint4 b = inputs[part][0];
        if constexpr (kHalves) {
          const uint2 first[2] = {HalvesOfCodes(chunks[part].x), HalvesOfCodes(chunks[part].y)};
          const uint2 second[2] = {HalvesOfCodes(chunks[part].z), HalvesOfCodes(chunks[part].w)};
          MultiplyF16(acc[0], {{first[0].x, first[1].x, first[0].y, first[1].y}}, b.x, b.y);
          MultiplyF16(acc[1], {{second[0].x, second[1].x, second[0].y, second[1].y}}, b.z, b.w);
        } else {
          const uint4 &first = chunks[2 * part], &second = chunks[2 * part + 1];
          MultiplyBf16(acc[0], {{first.x, first.y, first.z, first.w}}, b.x, b.y);
          MultiplyBf16(acc[0], {{second.x, second.y, second.z, second.w}}, b.z, b.w);
        }
      }
      float scale = 1;
      if constexpr (kHalves) {
        // As `Scales` of decoded weights: short of `kUnscale`, and infinite from 2^38 on.
        scale = __uint_as_float((weights.scales[unit].raw + 90u) << 23) * 0x1p-120f * input_scale;
      }
      load();
#pragma unroll
      for (int i = 1; i < kChains; ++i) {
        acc[0][0] += acc[i][0];
        acc[0][2] += acc[i][2];
      }
      return {acc[0][0] * scale, acc[0][2] * scale};
    }
  }

  static __device__ __forceinline__ void Write(const GemmSegment& gemm, int output, float sum) {
    if (gemm.float_output) {
      static_cast<float*>(gemm.output)[output] = sum;
    } else {
      static_cast<uint16_t*>(gemm.output)[output] = ToBfloat16(sum);
    }
  }

  static __device__ __forceinline__ void Run(const RowParams& p, const RowSegment& s,
                                             uint8_t* memory) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int units_log2 = s.units_log2, k_warps_log2 = s.k_warps_log2;
    const int block_rows_log2 = kWarpsLog2 - k_warps_log2 + units_log2 + 4;
    const int first_row = blockIdx.y * s.outputs_per_group +
                          ((static_cast<int>(blockIdx.x) - s.first_block) << block_rows_log2);
    const int first_unit = first_row / kWarpTileRows + (warp >> k_warps_log2 << units_log2);
    const int first_block = warp & ((1 << k_warps_log2) - 1);
    int column = first_block * kBlockColumns + lane * 4;
    const uint16_t* x = p.x + blockIdx.y * p.width;
    uint2 pairs = {};
    const auto load_inputs = [&] {
      pairs = {};
      if (column < p.width) pairs = LoadPairs(x + column);
      column += kBlockColumns << k_warps_log2;
    };
    load_inputs();

    const int turns_of_block = (1 << units_log2) / kUnits;
    const int blocks = (p.blocks_per_row - first_block + (1 << k_warps_log2) - 1) >> k_warps_log2;
    Weights weights;
    weights.codes = s.gemm.codes + lane * 16;
    weights.unit_scales = s.gemm.scales + (kIsFp4 ? (lane / 4 * 2 + lane % 2) * sizeof(Scales) : 0);
    weights.unit = (first_unit / kWarpTilesPerBlock * p.blocks_per_row + first_block) *
                       kWarpTilesPerBlock +
                   first_unit % kWarpTilesPerBlock;
    weights.turns_left =
        first_unit * kWarpTileRows < s.gemm.num_outputs ? blocks * turns_of_block : 0;
    weights.turns_of_block_left = turns_of_block;
    const int next_block = (kWarpTilesPerBlock << k_warps_log2) - (1 << units_log2);
    const auto load = [&] { weights.Load(turns_of_block, next_block); };
    load();
    // Now, because later nothing would hide how long it takes.
    float global_scale;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(global_scale) : "l"(s.gemm.global_scale));

    RowInputs& mine = reinterpret_cast<RowInputs*>(memory)[warp];
    float* partial = reinterpret_cast<float*>(memory + (sizeof(RowInputs) << kWarpsLog2));
    float* const sums = partial + (warp << units_log2) * kWarpTileRows + lane / 4;
    const auto* inputs = reinterpret_cast<const uint4(*)[4]>(&mine.steps[0][lane % 4]);
    if (kIsFp4) {
      reinterpret_cast<uint2*>(mine.zeros)[lane] = {};
      if (lane / 4 != lane % 4) {
        inputs = reinterpret_cast<const uint4(*)[4]>(&mine.zeros[0][lane % 4]);
      }
    }
    float input_scale = 1;
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      StoreInputs(mine, pairs, input_scale);
      if (block + 1 < blocks) load_inputs();
      float* to = sums;
#pragma unroll 1
      for (int turn = 0; turn < turns_of_block; ++turn) {
        float2 pair[kUnits];
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
          pair[unit] = Multiply(weights, unit, inputs, input_scale, load);
        }
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit, to += kWarpTileRows) {
          if (lane % 4 != 0) continue;
          if (block > 0) pair[unit] = {pair[unit].x + to[0], pair[unit].y + to[8]};
          to[0] = pair[unit].x;
          to[8] = pair[unit].y;
        }
      }
    }
    __syncthreads();
    // So many threads for each output that each adds up to eight sums.
    const int parts_log2 = max(k_warps_log2 - 3, 0), parts = 1 << parts_log2;
    const float factor = global_scale * WeightTiles<format>::kUnscale *
                         (kIsFp4 ? kInputUnscale : 1.0f);
    const int k_warps = 1 << k_warps_log2, warp_floats = kWarpTileRows << units_log2;
#pragma unroll 1
    for (int i = threadIdx.x; i < parts << block_rows_log2; i += (32 << kWarpsLog2)) {
      const int output = i >> parts_log2, unit = output / kWarpTileRows;
      const float* from = partial + (unit >> units_log2 << k_warps_log2) * warp_floats +
                          (output & (warp_floats - 1));
      float sum = 0;
      const int part = i & (parts - 1);
#pragma unroll 8
      for (int k = part; k < k_warps; k += parts) sum += from[k * warp_floats];
#pragma unroll 1
      for (int distance = 1; distance < parts; distance *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      }
      if (part == 0 && first_row + output < s.gemm.num_outputs) {
        Write(s.gemm, first_row + output, sum * factor);
      }
    }
  }
};

template <int kWarpsLog2, WeightFormat format>
__device__ __forceinline__ bool RunRow(const RowParams& p, const RowSegment& s, uint8_t* memory) {
  if (s.gemm.format != format) return false;
  if (format != WeightFormat::kBf16 && s.gemm.round_input) {
    RowKernel<kWarpsLog2, format, true>::Run(p, s, memory);
  } else {
    RowKernel<kWarpsLog2, format, false>::Run(p, s, memory);
  }
  return true;
}

template <int kWarpsLog2, WeightFormat... formats>
__global__ void __launch_bounds__(32 << kWarpsLog2, 1)
    GemmRow(const __grid_constant__ RowParams p) {
  extern __shared__ __align__(128) uint8_t row_shared[];
  int segment = 0;
  while (segment + 1 < p.num_segments &&
         static_cast<int>(blockIdx.x) >= p.segments[segment + 1].first_block) {
    ++segment;
  }
  (void)(RunRow<kWarpsLog2, formats>(p, p.segments[segment], row_shared) || ...);
}

}  // namespace dsv4
