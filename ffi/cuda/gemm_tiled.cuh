// Products with many rows of input: weights are decoded in registers for wgmma, once for a tile of
// up to 256 rows.
//
// Blocks stay and take tile after tile. A block has a producer warp, which fills a ring of stages
// of 128 inputs and runs ahead into the next tile, and two consumer warpgroups of 64 outputs each,
// which get most of the registers. The blocks of a cluster split the inputs and add up at the end
// of a tile, in a fixed order.
#pragma once

#include "gemm_tiled_outputs.cuh"
#include "gemm_tiled_products.cuh"
#include "tma.cuh"

namespace dsv4 {

template <WeightFormat format, int kTokens, bool kCodes>
struct TiledKernel : TiledRing<format, kTokens, kCodes> {
  using Base = TiledRing<format, kTokens, kCodes>;
  using typename Base::Shared;
  using typename Base::Stages;
  using typename Base::Work;
  using Products = TiledProducts<format, kTokens, kCodes>;
  using Position = typename Products::Position;
  using Outputs = TiledOutputs<format, kTokens, kCodes>;
  static constexpr int kConsumers = Base::kConsumers, kParts = Base::kParts;
  static constexpr int kConsumerThreads = Base::kConsumerThreads, kStages = Base::kStages;

  // One of the copies that fill a stage.
  struct Copy {
    uint8_t* target;
    const uint8_t* source;
    int target_stride, source_stride, bytes;
  };

  static __device__ __forceinline__ Copy CopyOfLane(const TiledParams& p, const Work& work,
                                                    Shared& shared, int lane) {
    constexpr int kFirstInput = 2 * kConsumers;
    Stages& ring = shared.ring;
    const int64_t input_block = work.first_input_block + work.begin;
    const int tiles = work.InputTiles(p);
    if (lane < kFirstInput) {
      const int row_block = work.row_block + lane % kConsumers;
      const bool codes = lane < kConsumers;
      const int bytes = codes ? CodeBytes(format) : Base::kBlockScaleBytes;
      return {codes ? ring.codes[0][lane % kConsumers] : ring.scales[0][lane % kConsumers],
              (codes ? p.gemm.codes : p.gemm.scales) +
                  (int64_t{row_block} * p.blocks_per_row + work.begin) * bytes,
              kConsumers * bytes, bytes, row_block * kBlockRows < p.gemm.num_outputs ? bytes : 0};
    }
    if (lane < kFirstInput + kParts) {
      const int part = lane - kFirstInput;
      const int64_t tile = (input_block * kParts + part) * p.row_tiles + work.first_token / 8;
      return {ring.inputs[0][part], p.inputs + tile * kTileBytes,
              static_cast<int>(sizeof(ring.inputs[0])), kParts * p.row_tiles * kTileBytes,
              tiles * kTileBytes};
    }
    const float* scales = p.input_scales + input_block * p.row_tiles * 8 + work.first_token;
    return {reinterpret_cast<uint8_t*>(ring.input_scales[0]),
            reinterpret_cast<const uint8_t*>(scales),
            static_cast<int>(sizeof(ring.input_scales[0])), p.row_tiles * 32,
            kCodes && lane == kFirstInput + kParts ? tiles * 32 : 0};
  }

  // A warp, each of whose lanes issues one copy of a stage.
  static __device__ __forceinline__ void Produce(const TiledParams& p, const Work& work,
                                                 Shared& shared, Position& position) {
    const int lane = threadIdx.x % 32;
    Copy copy = CopyOfLane(p, work, shared, lane);
    const int stage_bytes = __reduce_add_sync(0xffffffffu, copy.bytes);
    for (int k = work.begin; k < work.end; ++k) {
      uint64_t* full = &shared.full[position.slot];
      WaitBarrier(&shared.empty[position.slot], position.parity ^ 1);
      if (lane == 0) ArriveExpectingBytes(full, stage_bytes);
      if (copy.bytes > 0) {
        LoadBulk(copy.target + position.slot * copy.target_stride, copy.source, copy.bytes, full);
      }
      copy.source += copy.source_stride;
      position.Advance();
    }
  }

  static __device__ __forceinline__ void Consume(const TiledParams& p, Shared& shared, int cluster,
                                                 int num_clusters) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int group = threadIdx.x / 128;
    const float factor =
        __ldg(p.gemm.global_scale) * (kCodes ? 1 : WeightTiles<format>::kUnscale);
    Position position;
    float acc[kTokens / 2];
    for (int tile = cluster; tile < p.num_tiles; tile += num_clusters) {
      const Work work(p, tile);
      const BlockScales<format> scales(p, work, work.row_block + group);
      if constexpr (kCodes) {
        Products::MultiplyCodes(p, work, shared, position, scales, acc);
      } else {
        Products::Multiply(p, work, shared, position, scales, acc);
      }
      Outputs::Finish(p, work, shared, acc, factor);
    }
  }

  static __device__ __forceinline__ void Run(const TiledParams& p) {
    extern __shared__ __align__(1024) uint8_t tiled_shared[];
    Shared& shared = *reinterpret_cast<Shared*>(tiled_shared);
    const int cluster = blockIdx.x / p.ranks, num_clusters = gridDim.x / p.ranks;
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        InitBarrier(&shared.full[i], 1);
        InitBarrier(&shared.empty[i], kConsumerThreads / 32 * kArrivalsOfWarp);
      }
      FenceBarrierInit();
    }
    __syncthreads();
    if (threadIdx.x < kConsumerThreads) {
      Consume(p, shared, cluster, num_clusters);
    } else {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
      Position position;
      for (int tile = cluster; tile < p.num_tiles; tile += num_clusters) {
        if (threadIdx.x / 32 == kConsumerThreads / 32) {
          Produce(p, Work(p, tile), shared, position);
        }
        __syncwarp();
        // While the sums lie where the ring was; a cluster's barrier counts all threads.
        if (p.ranks > 1) {
          SyncCluster();
          ArriveAtCluster();
          WaitForCluster();
        }
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
