// Products with many rows of input: weights are decoded in registers for wgmma, once for a tile of
// up to 256 rows.
//
// A block has a producer warp, which fills a ring of stages of 128 inputs, and two consumer
// warpgroups of 64 outputs each, which get most of the registers. The blocks of a cluster either
// take neighbouring outputs and fetch the input rows for each other, or split the inputs and add up
// at the end, in a fixed order.
#pragma once

#include "cluster.cuh"
#include "dsv4/gemm_segment.h"
#include "gemm_input.cuh"
#include "tma.cuh"
#include "warpgroup.cuh"
#include "weight_tiles.cuh"

namespace dsv4 {

struct TiledParams {
  GemmSegment gemm;
  const uint8_t* inputs;
  const float* input_scales;  // of codes
  int32_t num_rows, row_tiles, blocks_per_row, outputs_per_group;
  bool shares_inputs;  // what a cluster does
};

// With `kCodes` the inputs are E4M3 codes and so are the weights: products of FP8 units, whose sums
// over 128 inputs are scaled into the accumulators.
template <WeightFormat format, int kTokens, bool kCodes>
struct TiledKernel {
  static_assert(!kCodes || (format == WeightFormat::kFp8Block && kTokens == 128));
  static constexpr int kConsumers = 2, kConsumerThreads = kConsumers * 128;
  static constexpr int kThreads = kConsumerThreads + 128;
  static constexpr int kConsumerBarrier = 1;
  static constexpr int kRows = kConsumers * kBlockRows;
  static constexpr int kParts = kCodes ? 1 : 2, kPartBytes = kTokens / 8 * kTileBytes;
  static constexpr int kBlockScaleBytes =
      format == WeightFormat::kFp8Block ? 0 : ScaleBytes(format);
  static constexpr int kStageBytes = kParts * kPartBytes +
                                     kConsumers * (CodeBytes(format) + kBlockScaleBytes) +
                                     kCodes * kTokens * 4;
  static constexpr int kRingBytes = 226 * 1024, kMaxStages = 8;
  static constexpr int kStages =
      kRingBytes / kStageBytes < kMaxStages ? kRingBytes / kStageBytes : kMaxStages;
  static constexpr int kRowStride = kRows + 4;

  struct Ring {
    alignas(1024) uint8_t inputs[kStages][kParts][kPartBytes];  // as the swizzle requires
    uint8_t codes[kStages][kConsumers][CodeBytes(format)];
    uint8_t scales[kStages][kConsumers][kBlockScaleBytes + (kBlockScaleBytes == 0)];
    alignas(16) float input_scales[kStages][kCodes ? kTokens : 1];
  };

  struct Shared {
    union {
      Ring ring;
      float sums[kTokens * kRowStride];
    };
    uint64_t full[kStages], empty[kStages];
  };

  // What a block does: rows of weights, rows of input, a range of blocks of 128 inputs.
  struct Work {
    int sharers, sharer;  // of the input rows
    int ranks, rank;      // of the inputs
    int row_block, first_token, begin, end;
    int first_input_block;  // of the group
  };

  // One of the copies that fill a stage.
  struct Copy {
    uint8_t* target;
    const uint8_t* source;
    int target_stride, source_stride, bytes;
  };

  static __device__ __forceinline__ Copy CopyOfLane(const TiledParams& p, const Work& work,
                                                    Shared& shared, int lane) {
    constexpr int kFirstInput = 2 * kConsumers;
    Ring& ring = shared.ring;
    const int64_t input_block = work.first_input_block + work.begin;
    const int tiles = InputTilesOf(p, work);
    if (lane < kFirstInput) {
      const int row_block = work.row_block + lane % kConsumers;
      const bool codes = lane < kConsumers;
      const int bytes = codes ? CodeBytes(format) : kBlockScaleBytes;
      return {codes ? ring.codes[0][lane % kConsumers] : ring.scales[0][lane % kConsumers],
              (codes ? p.gemm.codes : p.gemm.scales) +
                  (int64_t{row_block} * p.blocks_per_row + work.begin) * bytes,
              kConsumers * bytes, bytes, row_block * kBlockRows < p.gemm.num_outputs ? bytes : 0};
    }
    if (lane < kFirstInput + kParts) {
      const int part = lane - kFirstInput;
      const int begin = tiles * work.sharer / work.sharers;
      const int end = tiles * (work.sharer + 1) / work.sharers;
      const int64_t tile =
          (input_block * kParts + part) * p.row_tiles + work.first_token / 8 + begin;
      return {ring.inputs[0][part] + begin * kTileBytes, p.inputs + tile * kTileBytes,
              kParts * kPartBytes, kParts * p.row_tiles * kTileBytes, (end - begin) * kTileBytes};
    }
    const float* scales = p.input_scales + input_block * p.row_tiles * 8 + work.first_token;
    return {reinterpret_cast<uint8_t*>(ring.input_scales[0]),
            reinterpret_cast<const uint8_t*>(scales),
            static_cast<int>(sizeof(ring.input_scales[0])), p.row_tiles * 32,
            kCodes && lane == kFirstInput + kParts ? tiles * 32 : 0};
  }

  static __device__ __forceinline__ int InputTilesOf(const TiledParams& p, const Work& work) {
    return min(kTokens / 8, p.row_tiles - work.first_token / 8);
  }

  // A warp, each of whose lanes issues one copy of a stage.
  static __device__ __forceinline__ void Produce(const TiledParams& p, const Work& work,
                                                 Shared& shared) {
    const int lane = threadIdx.x % 32;
    Copy copy = CopyOfLane(p, work, shared, lane);
    const bool is_input = lane >= 2 * kConsumers && lane < 2 * kConsumers + kParts;
    const int stage_bytes = __reduce_add_sync(0xffffffffu, is_input ? 0 : copy.bytes) +
                            kParts * InputTilesOf(p, work) * kTileBytes;
    RingPosition<kStages> position;
    for (int k = work.begin; k < work.end; ++k) {
      uint64_t* full = &shared.full[position.slot];
      WaitBarrierOfCluster(&shared.empty[position.slot], position.parity ^ 1);
      if (lane == 0) ArriveExpectingBytes(full, stage_bytes);
      uint8_t* target = copy.target + position.slot * copy.target_stride;
      if (is_input && work.sharers > 1) {
        if (copy.bytes > 0) {
          LoadBulkToCluster(target, copy.source, copy.bytes, full, (1 << work.sharers) - 1);
        }
      } else if (copy.bytes > 0) {
        LoadBulk(target, copy.source, copy.bytes, full);
      }
      copy.source += copy.source_stride;
      position.Advance();
    }
  }

  // By a warp that has read a stage, to all blocks that fill it.
  static __device__ __forceinline__ void Release(const Work& work, uint64_t* empty, int lane) {
    if (work.sharers == 1) {
      if (lane == 0) Arrive(empty);
    } else if (lane < work.sharers) {
      ArriveInCluster(ClusterAddress(empty, lane));
    }
  }

  // Scale bytes of FP8 blocks are read where they lie, one block ahead.
  struct BlockScales {
    const uint8_t* scales;
    int end;
    uint8_t next = 0;

    __device__ __forceinline__ BlockScales(const TiledParams& p, const Work& work, int row_block)
        : scales(p.gemm.scales + int64_t{row_block} * p.blocks_per_row),
          end(format == WeightFormat::kFp8Block && row_block * kBlockRows < p.gemm.num_outputs
                  ? work.end
                  : 0) {
      if (work.begin < end) next = scales[work.begin];
    }

    __device__ __forceinline__ uint8_t At(int k) {
      const uint8_t scale = next;
      if (k + 1 < end) next = scales[k + 1];
      return scale;
    }
  };

  static __device__ __forceinline__ void Consume(const TiledParams& p, const Work& work,
                                                 Shared& shared, float (&acc)[kTokens / 2]) {
    using Tiles = WeightTiles<format>;
    constexpr int kHalfChunks = NumChunks(format) / 2, kHalfSteps = kStepsPerBlock / 2;
    const int group = threadIdx.x / 128, warp_tile = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    BlockScales block_scales(p, work, work.row_block + group);
    RingPosition<kStages> position;
    uint32_t previous = 0;
    for (int k = work.begin; k < work.end; ++k) {
      const uint32_t slot = position.slot;
      const uint8_t block_scale = block_scales.At(k);
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
        if (half == 0 && k > work.begin) Release(work, &shared.empty[previous], lane);
      }
      previous = slot;
      position.Advance();
    }
    WaitProductsExcept<0>();
  }

  static __device__ __forceinline__ uint4 Chunk(const uint8_t* block, int warp_tile, int index,
                                                int lane) {
    return *reinterpret_cast<const uint4*>(
        block + (warp_tile * NumChunks(format) + index) * kChunkBytes + lane * 16);
  }

  static __device__ __forceinline__ void ConsumeCodes(const TiledParams& p, const Work& work,
                                                      Shared& shared, float (&acc)[kTokens / 2]) {
    constexpr int kChunks = NumChunks(format);
    const int group = threadIdx.x / 128, warp_tile = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    BlockScales block_scales(p, work, work.row_block + group);
    RingPosition<kStages> position;
    for (int k = work.begin; k < work.end; ++k) {
      const uint32_t slot = position.slot;
      // Short of `kUnscale`, as the other weights.
      const float scale = DecodeE8m0(block_scales.At(k)) * (1 / WeightTiles<format>::kUnscale);
      WaitBarrier(&shared.full[slot], position.parity);
      uint4 chunks[kChunks];
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        chunks[c] = Chunk(shared.ring.codes[slot][group], warp_tile, c, lane);
      const uint64_t b = SwizzledRows(SharedAddress(shared.ring.inputs[slot][0]));
      float sums[kTokens / 2];
      FenceProducts();
#pragma unroll
      for (int c = 0; c < kChunks; ++c) MultiplyCodesAsync(sums, chunks[c], b + 2 * c, c > 0);
      CommitProducts();
      float2 input_scales[kTokens / 8];
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i) {
        input_scales[i] =
            *reinterpret_cast<const float2*>(&shared.ring.input_scales[slot][i * 8 + lane % 4 * 2]);
      }
      WaitProductsExcept<0>();
      Release(work, &shared.empty[slot], lane);
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) {
        acc[i] += sums[i] * (scale * (i % 2 ? input_scales[i / 4].y : input_scales[i / 4].x));
      }
      position.Advance();
    }
  }

  // Sums over the cluster, of which each block finishes a share of the rows of input.
  static __device__ __forceinline__ void Finish(const TiledParams& p, const Work& work,
                                                Shared& shared, const float (&acc)[kTokens / 2],
                                                float factor) {
    const int ranks = work.ranks, rank = work.rank, share = kTokens / ranks;
    const int lane = threadIdx.x % 32;
    SyncThreads(kConsumerBarrier, kConsumerThreads);  // the sums lie where the ring was
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
      const int row = threadIdx.x / 32 * kWarpTileRows + lane / 4 + i / 2 % 2 * 8;
      shared.sums[token * kRowStride + row] = acc[i];
    }
    if (ranks > 1) {
      SyncCluster();
    } else {
      SyncThreads(kConsumerBarrier, kConsumerThreads);
    }
    for (int i = threadIdx.x; i < share * (kRows / 4); i += kConsumerThreads) {
      const int row = i % (kRows / 4) * 4, token = rank * share + i / (kRows / 4);
      const int n = work.row_block * kBlockRows + row;
      const int64_t m = work.first_token + token;
      if (m >= p.num_rows || n >= p.gemm.num_outputs) continue;
      const auto* part = reinterpret_cast<const float4*>(&shared.sums[token * kRowStride + row]);
      float sums[4] = {};
      for (int r = 0; r < ranks; ++r) {
        const float4 of_rank = ranks > 1 ? LoadFromRank(part, r) : *part;
        sums[0] += of_rank.x;
        sums[1] += of_rank.y;
        sums[2] += of_rank.z;
        sums[3] += of_rank.w;
      }
#pragma unroll
      for (float& sum : sums) sum *= factor;
      Write(p.gemm, m * p.gemm.num_outputs + n, sums, min(4, p.gemm.num_outputs - n));
    }
    if (ranks > 1) SyncCluster();  // others have read the sums
  }

  static __device__ __forceinline__ void Write(const GemmSegment& gemm, int64_t index,
                                               const float (&y)[4], int count) {
    const bool aligned = gemm.num_outputs % 4 == 0;
    if (gemm.float_output) {
      float* output = static_cast<float*>(gemm.output) + index;
      if (aligned) {
        *reinterpret_cast<float4*>(output) = {y[0], y[1], y[2], y[3]};
      } else {
        for (int i = 0; i < count; ++i) output[i] = y[i];
      }
    } else {
      uint16_t* output = static_cast<uint16_t*>(gemm.output) + index;
      if (aligned) {
        *reinterpret_cast<uint2*>(output) = {ToBfloat16(y[0]) | uint32_t{ToBfloat16(y[1])} << 16,
                                             ToBfloat16(y[2]) | uint32_t{ToBfloat16(y[3])} << 16};
      } else {
        for (int i = 0; i < count; ++i) output[i] = ToBfloat16(y[i]);
      }
    }
  }

  static __device__ __forceinline__ void Run(const TiledParams& p) {
    extern __shared__ __align__(1024) uint8_t tiled_shared[];
    Shared& shared = *reinterpret_cast<Shared*>(tiled_shared);
    const int cluster = gridDim.x, in_cluster = blockIdx.x;
    Work work;
    work.sharers = p.shares_inputs ? cluster : 1;
    work.sharer = p.shares_inputs ? in_cluster : 0;
    work.ranks = p.shares_inputs ? 1 : cluster;
    work.rank = p.shares_inputs ? 0 : in_cluster;
    work.first_token = blockIdx.y * kTokens;
    work.row_block = (blockIdx.z * work.sharers + work.sharer) * kConsumers;
    work.begin = p.blocks_per_row * work.rank / work.ranks;
    work.end = p.blocks_per_row * (work.rank + 1) / work.ranks;
    work.first_input_block = work.row_block * kBlockRows / p.outputs_per_group * p.blocks_per_row;
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        InitBarrier(&shared.full[i], 1);
        InitBarrier(&shared.empty[i], kConsumerThreads / 32 * work.sharers);
      }
      FenceBarrierInit();
    }
    if (work.sharers > 1) {
      SyncCluster();
    } else {
      __syncthreads();
    }
    if (threadIdx.x < kConsumerThreads) {
      asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
      const float factor = __ldg(p.gemm.global_scale) * WeightTiles<format>::kUnscale;
      float acc[kTokens / 2] = {};
      if constexpr (kCodes) {
        ConsumeCodes(p, work, shared, acc);
      } else {
        Consume(p, work, shared, acc);
      }
      if (work.sharers > 1) ArriveAtCluster();
      Finish(p, work, shared, acc, factor);
      if (work.sharers > 1) WaitForCluster();  // until nobody signals to this block
    } else {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
      if (threadIdx.x / 32 == kConsumerThreads / 32) Produce(p, work, shared);
      __syncwarp();
      // A cluster's barrier counts all threads.
      if (work.ranks > 1) {
        SyncCluster();
        SyncCluster();
      } else if (work.sharers > 1) {
        ArriveAtCluster();
        WaitForCluster();
      }
    }
  }
};

template <WeightFormat format, int kTokens, bool kCodes>
__global__ void __launch_bounds__(TiledKernel<format, kTokens, kCodes>::kThreads, 1)
    TiledGemm(const __grid_constant__ TiledParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere there is no wgmma, and the handler does not come here
  TiledKernel<format, kTokens, kCodes>::Run(params);
#endif
}

}  // namespace dsv4
