// A consumer warpgroup's products: 64 outputs by the tokens of a tile.
#pragma once

#include "fp4_codes.cuh"
#include "gemm_tiled_ring.cuh"
#include "warpgroup.cuh"
#include "weight_tiles.cuh"

namespace dsv4 {

// Scale bytes of FP8 blocks are read where they lie, a lane each, before they are needed.
template <WeightFormat format>
struct BlockScales {
  const uint8_t* scales;
  int begin, end;
  uint32_t mine = 0;

  template <class Work>
  __device__ __forceinline__ BlockScales(const TiledParams& p, const Work& work, int row_block)
      : scales(p.gemm.scales + int64_t{row_block} * p.blocks_per_row),
        begin(work.begin),
        end(format == WeightFormat::kFp8Block && row_block * kBlockRows < p.gemm.num_outputs
                ? work.end
                : 0) {
    Read();
  }

  __device__ __forceinline__ void Read() {
    const int k = begin + threadIdx.x % 32;
    mine = k < end ? __ldg(scales + k) : 0;
  }

  // For ascending k.
  __device__ __forceinline__ uint8_t At(int k) {
    if (k == begin + 32) {
      begin = k;
      Read();
    }
    return __shfl_sync(0xffffffffu, mine, k - begin);
  }
};

template <WeightFormat format, int kTokens, bool kCodes>
struct TiledProducts : TiledRing<format, kTokens, kCodes> {
  using Base = TiledRing<format, kTokens, kCodes>;
  using typename Base::Shared;
  using typename Base::Work;
  using Position = RingPosition<Base::kStages>;
  using Tiles = WeightTiles<format>;
  using Accumulator = float[kTokens / 2];

  static __device__ __forceinline__ uint4 Chunk(const uint8_t* block, int warp_tile, int index,
                                                int lane) {
    return *reinterpret_cast<const uint4*>(
        block + (warp_tile * NumChunks(format) + index) * kChunkBytes + lane * 16);
  }

  // Decoded weights times inputs, both bfloat16.
  static __device__ __forceinline__ void Multiply(const TiledParams& p, const Work& work,
                                                  Shared& shared, Position& position,
                                                  BlockScales<format> block_scales,
                                                  Accumulator& acc) {
    constexpr int kHalfChunks = NumChunks(format) / 2, kHalfSteps = kStepsPerBlock / 2;
    const int group = threadIdx.x / 128, warp_tile = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#pragma unroll
    for (float& sum : acc) sum = 0;
    uint32_t previous = 0;
    for (int k = work.begin; k < work.end; ++k) {
      const uint32_t slot = position.slot;
      uint8_t block_scale = 0;
      if (format == WeightFormat::kFp8Block) block_scale = block_scales.At(k);
      WaitBarrier(&shared.full[slot], position.parity);
      const auto raw = Tiles::LoadScale(
          format == WeightFormat::kFp8Block ? &block_scale : shared.ring.scales[slot][group],
          warp_tile, lane);
      Fragment fragments[2][kHalfSteps];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int c = 0; c < kHalfChunks; ++c) {
          const int chunk_index = half * kHalfChunks + c;
          const uint4 chunk = Chunk(shared.ring.codes[slot][group], warp_tile, chunk_index, lane);
          const RowScales scales = Tiles::Scales(raw, chunk_index);
#pragma unroll
          for (int s = 0; s < Tiles::kStepsPerChunk; ++s) {
            fragments[half][c * Tiles::kStepsPerChunk + s] = Tiles::Decode(chunk, s, scales);
          }
        }
        const uint64_t b = SwizzledRows(SharedAddress(shared.ring.inputs[slot][half]));
        FenceProducts();
#pragma unroll
        for (int s = 0; s < kHalfSteps; ++s) MultiplyAsync(acc, fragments[half][s], b + 2 * s);
        CommitProducts();
        // The fragments decoded next were read by the group before this one.
        WaitProductsExcept<1>();
        if (half == 0 && k > work.begin) ArriveAsWarp(&shared.empty[previous]);
      }
      previous = slot;
      position.Advance();
    }
    WaitProducts(acc);
    ArriveAsWarp(&shared.empty[previous]);
  }

  // The operands of a block of E4M3 weights, and the factors of its sums in rows l / 4 and
  // l / 4 + 8.
  struct CodeBlock {
    uint4 chunks[4];
    float factors[2];

    // Products under way read the registers, which the compiler does not know.
    __device__ __forceinline__ void Keep() const {
#pragma unroll
      for (const uint4& chunk : chunks) {
        asm volatile("" ::"r"(chunk.x), "r"(chunk.y), "r"(chunk.z), "r"(chunk.w));
      }
    }
  };

  static __device__ __forceinline__ CodeBlock LoadCodes(Shared& shared, uint32_t slot,
                                                        uint8_t block_scale) {
    const int group = threadIdx.x / 128, warp_tile = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    CodeBlock block;
    if constexpr (format == WeightFormat::kFp8Block) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        block.chunks[c] = Chunk(shared.ring.codes[slot][group], warp_tile, c, lane);
      }
      // From 2^38 on scales are infinite, as in bfloat16.
      constexpr uint8_t kInfinite = 165;
      block.factors[0] = block.factors[1] =
          block_scale < kInfinite ? DecodeE8m0(block_scale) : __uint_as_float(0x7f800000u);
    } else {
      const Fp4Codes codes(Tiles::LoadScale(shared.ring.scales[slot][group], warp_tile, lane));
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const uint4 pairs = Chunk(shared.ring.codes[slot][group], warp_tile, c / 2, lane);
        block.chunks[c] =
            c % 2 ? codes.Decode(pairs.z, pairs.w) : codes.Decode(pairs.x, pairs.y);
      }
      block.factors[0] = codes.Factor(0);
      block.factors[1] = codes.Factor(1);
    }
    return block;
  }

  // Codes times codes. The sums of 128 inputs, which the units keep in less than float32, are
  // scaled into the accumulators.
  static __device__ __forceinline__ void MultiplyCodes(const TiledParams& p, const Work& work,
                                                       Shared& shared, Position& position,
                                                       BlockScales<format> block_scales,
                                                       Accumulator& acc) {
    constexpr int kPartTokens = kTokens < 128 ? kTokens : 128, kParts = kTokens / kPartTokens;
    // Where products are short, the next block's codes are read behind them.
    constexpr bool kReadsAhead = kTokens < 128;
    const int lane = threadIdx.x % 32;
    const auto load = [&](int k) {
      const uint8_t scale = format == WeightFormat::kFp8Block ? block_scales.At(k) : 0;
      WaitBarrier(&shared.full[position.slot], position.parity);
      return LoadCodes(shared, position.slot, scale);
    };
#pragma unroll
    for (float& sum : acc) sum = 0;
    CodeBlock block = load(work.begin);
    for (int k = work.begin; k < work.end; ++k) {
      const uint32_t slot = position.slot;
      const bool last = k + 1 == work.end;
      CodeBlock next;
      position.Advance();
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint64_t b = SwizzledRows(
            SharedAddress(shared.ring.inputs[slot][0] + part * kPartTokens / 8 * kTileBytes));
        float sums[kPartTokens / 2];
        FenceProducts();
#pragma unroll
        for (int c = 0; c < 4; ++c) MultiplyCodesAsync(sums, block.chunks[c], b + 2 * c, c > 0);
        CommitProducts();
        if (kReadsAhead && !last) next = load(k + 1);
        WaitProducts(sums);
        if (kReadsAhead) block.Keep();
        const float* scales = shared.ring.input_scales[slot] + part * kPartTokens + lane % 4 * 2;
        ScaleInto(acc + part * (kPartTokens / 2), sums, scales, block.factors);
      }
      ArriveAsWarp(&shared.empty[slot]);
      if (!last) block = kReadsAhead ? next : load(k + 1);
    }
  }

  // acc += sums times the factors of their rows and inputs.
  template <int kSize>
  static __device__ __forceinline__ void ScaleInto(float* acc, const float (&sums)[kSize],
                                                   const float* scales,
                                                   const float (&factors)[2]) {
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const float2 scale = *reinterpret_cast<const float2*>(scales + i * 2);
      acc[i] += sums[i] * (factors[0] * scale.x);
      acc[i + 1] += sums[i + 1] * (factors[0] * scale.y);
      acc[i + 2] += sums[i + 2] * (factors[1] * scale.x);
      acc[i + 3] += sums[i + 3] * (factors[1] * scale.y);
    }
  }
};

}  // namespace dsv4
