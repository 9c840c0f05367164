// Products with up to 64 rows of input on Hopper: the input stays in shared memory, weights pass
// once from memory into registers, several loads ahead, where they are decoded for wgmma.
//
// The blocks of a cluster share the inputs out among themselves. A tile of outputs is a cluster's:
// each of a block's four warpgroups multiplies 64 outputs, or warpgroups share out the block's
// inputs too. Each block of the cluster adds up a share of the tile, in a fixed order.
#pragma once

#include "cluster.cuh"
#include "gemm_input.cuh"
#include "gemm_stream.cuh"
#include "warpgroup.cuh"

namespace dsv4 {

struct ResidentParams {
  const uint16_t* x;
  int32_t num_rows, row_stride, width;
  int32_t blocks_per_row;  // of weights
  int32_t sharers_log2;    // warpgroups that share the inputs of one row of blocks
  int32_t max_blocks;      // of inputs in shared memory
  int32_t tokens_at_once;  // that a cluster adds up
  // The segments of each of the kernel's formats, and the clusters that multiply them.
  struct Part {
    int32_t first_segment, end_segment, num_tiles, first_cluster, num_clusters;
  } parts[2];
  StreamSegment segments[kMaxGemmSegments];
};

// Read once: L1 keeps the inputs.
__device__ __forceinline__ uint4 LoadOnce(const uint8_t* from) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}

template <int kTokens, WeightFormat... formats>
struct ResidentKernel {
  static constexpr int kGroups = 4, kThreads = kGroups * 128, kBarrier = 1;
  static constexpr int kInputBytes = kTokens * kBlockColumns * 2;  // of a block
  static constexpr int kPadding = 4;                               // against bank conflicts
  static constexpr int kTokenStep = 16;
  // Of weights in flight to each warp.
  static constexpr int kChunksAhead = 8;

  struct Barriers {
    uint64_t ready, taken;  // sums from the cluster's blocks
  };

  struct Shared {
    uint8_t* inputs;
    float* sums;  // [slots of 64 outputs, parts, rows, tokens at once and padding]
    Barriers* barriers;

    __device__ __forceinline__ Shared(const ResidentParams& p, uint8_t* memory)
        : inputs(memory),
          sums(reinterpret_cast<float*>(inputs + p.max_blocks * kInputBytes)),
          barriers(reinterpret_cast<Barriers*>(
              sums + kGroups * kBlockRows * (p.tokens_at_once + kPadding))) {}
  };

  static constexpr int SharedBytes(int max_blocks, int tokens_at_once) {
    return max_blocks * kInputBytes + kGroups * kBlockRows * (tokens_at_once + kPadding) * 4 +
           static_cast<int>(sizeof(Barriers));
  }

  static __device__ __forceinline__ const StreamSegment& SegmentOf(
      const ResidentParams& p, const ResidentParams::Part& part, int tile) {
    int segment = part.first_segment;
    while (segment + 1 < part.end_segment && tile >= p.segments[segment + 1].first_tile) ++segment;
    return p.segments[segment];
  }

  // Weights that a warp multiplies: a run of blocks of 128 inputs, of one of its tiles.
  template <WeightFormat format>
  struct Run {
    static constexpr int kWarpTileBytes = CodeBytes(format) / kWarpTilesPerBlock;
    static constexpr int kScaleStride = ScaleBytes(format);

    const uint8_t* codes;
    const uint8_t* scales;
    int num_blocks;

    __device__ __forceinline__ Run(const ResidentParams& p, const StreamSegment& segment,
                                   int tile) {
      const int group = threadIdx.x / 128, warp_tile = threadIdx.x / 32 % 4;
      const int lane = threadIdx.x % 32;
      const int row_block = ((tile - segment.first_tile) * kGroups + group) >> p.sharers_log2;
      const int begin = FirstBlock(p, group);
      const bool has_rows = row_block * kBlockRows < segment.gemm.num_outputs;
      num_blocks = has_rows ? FirstBlock(p, group + 1) - begin : 0;
      const int64_t block = int64_t{row_block} * p.blocks_per_row + begin;
      codes = segment.gemm.codes + block * CodeBytes(format) + warp_tile * kWarpTileBytes +
              lane * 16;
      scales = segment.gemm.scales + block * kScaleStride;
      if constexpr (format == WeightFormat::kMxfp4 || format == WeightFormat::kNvfp4) {
        scales += (warp_tile * 32 + lane) * (kScaleStride / 128);
      }
    }

    __device__ __forceinline__ void Advance(int blocks) {
      codes += blocks * CodeBytes(format);
      scales += blocks * kScaleStride;
      num_blocks -= blocks;
    }
  };

  // Of a warpgroup; of the group after a row of blocks' last sharer, where they end.
  static __device__ __forceinline__ int FirstBlock(const ResidentParams& p, int group) {
    const int sharers = 1 << p.sharers_log2;
    const int sharer = group - (threadIdx.x / 128 & ~(sharers - 1));
    return p.blocks_per_row * static_cast<int>(blockIdx.x * sharers + sharer) /
           static_cast<int>(gridDim.x * sharers);
  }

  // The block's inputs, of the group that the tile reads, in the tiles of `gemm_input.cuh`.
  static __device__ __forceinline__ void LoadInputs(const ResidentParams& p, const Shared& shared,
                                                    int input_group, bool round) {
    const int begin = p.blocks_per_row * blockIdx.x / gridDim.x;
    const int num_blocks = p.blocks_per_row * (blockIdx.x + 1) / gridDim.x - begin;
    // Sixteen lanes take 128 inputs of a row. All copies are under way before the first is waited
    // for; then each lane moves what it has copied, which leaves no other lanes' space.
    const int lane = threadIdx.x % 16, t = lane / 4, u = lane % 4;
    const auto for_each = [&](auto&& function) {
      int row = threadIdx.x / 16 % p.num_rows, block = threadIdx.x / 16 / p.num_rows;
      const int row_step = kThreads / 16 % p.num_rows, block_step = kThreads / 16 / p.num_rows;
      const int rounds = CeilDiv(p.num_rows * num_blocks, kThreads / 16);
#pragma unroll 2
      for (int i = 0; i < rounds; ++i) {
        function(row, shared.inputs + block * kInputBytes + row * 128, block);
        row += row_step;
        block += block_step;
        if (row >= p.num_rows) {
          row -= p.num_rows;
          ++block;
        }
      }
    };
    for_each([&](int row, uint8_t* inputs, int block) {
      const int column = (begin + block) * kBlockColumns + lane * 8;
      uint8_t* to = inputs + lane / 8 * (kTokens * 128) + lane % 8 * 16;
      if (block >= num_blocks) return;
      if (column < p.width) {
        CopyChunk(SharedAddress(to),
                  p.x + (int64_t{row} * p.row_stride + input_group * p.width + column));
      } else {
        *reinterpret_cast<uint4*>(to) = {};
      }
    });
    asm volatile("cp.async.wait_all;" ::: "memory");
    for_each([&](int row, uint8_t* inputs, int block) {
      const bool inside = block < num_blocks;
      uint4 values = {};
      if (inside) {
        values = *reinterpret_cast<uint4*>(inputs + lane / 8 * (kTokens * 128) + lane % 8 * 16);
      }
      if (round) {
        const uint32_t scale = ScaleOfShare(values);
        values = {RoundInput(values.x, scale), RoundInput(values.y, scale),
                  RoundInput(values.z, scale), RoundInput(values.w, scale)};
      }
      __syncwarp();
      if (!inside) return;
      // Steps 2 u and 2 u + 1, each in two parts of 16 bytes.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        *reinterpret_cast<uint32_t*>(inputs + u / 2 * (kTokens * 128) +
                                     ((u % 2 * 4 + i) ^ row % 8) * 16 + t * 4) = (&values.x)[i];
      }
    });
    FenceAsync();
    __syncthreads();
  }

  // The next blocks of a run in registers.
  template <WeightFormat format>
  struct Ahead {
    using Tiles = WeightTiles<format>;
    static constexpr int kChunks = NumChunks(format), kBlocks = kChunksAhead / kChunks;

    uint4 chunks[kBlocks][kChunks];
    typename Tiles::RawScale scales[kBlocks];

    __device__ __forceinline__ void LoadScale(const Run<format>& run, int block) {
      if (block >= run.num_blocks) return;
      // Of this lane and warp tile.
      scales[block] = Tiles::LoadScale(run.scales + block * Run<format>::kScaleStride, 0, 0);
    }

    __device__ __forceinline__ void LoadChunk(const Run<format>& run, int block, int chunk) {
      if (block >= run.num_blocks) return;
      chunks[block][chunk] =
          LoadOnce(run.codes + block * CodeBytes(format) + chunk * kChunkBytes);
    }

    __device__ __forceinline__ void Load(const Run<format>& run) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        LoadScale(run, block);
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) LoadChunk(run, block, chunk);
      }
    }
  };

  // Products of the run's next blocks, which are in registers; meanwhile those of `next` arrive.
  template <WeightFormat format>
  static __device__ __forceinline__ void Multiply(Ahead<format>& ahead, int num_blocks,
                                                  const Run<format>& next, uint32_t inputs,
                                                  float (&acc)[kTokens / 2]) {
    using Tiles = WeightTiles<format>;
    constexpr int kHalfChunks = NumChunks(format) / 2, kHalfSteps = kStepsPerBlock / 2;
    Fragment fragments[kHalfSteps];
#pragma unroll
    for (int block = 0; block < Ahead<format>::kBlocks; ++block) {
      const auto raw = ahead.scales[block];
      ahead.LoadScale(next, block);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int c = half * kHalfChunks; c < (half + 1) * kHalfChunks; ++c) {
          if (block < num_blocks) {
            const RowScales scales = Tiles::Scales(raw, c);
#pragma unroll
            for (int s = 0; s < Tiles::kStepsPerChunk; ++s) {
              fragments[c % kHalfChunks * Tiles::kStepsPerChunk + s] =
                  Tiles::Decode(ahead.chunks[block][c], s, scales);
            }
          }
          ahead.LoadChunk(next, block, c);
        }
        if (block < num_blocks) {
          MultiplyHalf(fragments, inputs + (2 * block + half) * (kInputBytes / 2), acc);
        }
      }
    }
  }

  // Products of half a block, whose inputs are at this address in shared memory.
  static __device__ __forceinline__ void MultiplyHalf(
      const Fragment (&fragments)[kStepsPerBlock / 2], uint32_t inputs, float (&acc)[kTokens / 2]) {
    FenceProducts();
#pragma unroll
    for (int s = 0; s < kStepsPerBlock / 2; ++s) {
      MultiplyAsync(acc, fragments[s], RowsDescriptor(RowsDescriptorLow(inputs) + 2 * s));
    }
    CommitProducts();
    WaitProductsExcept<0>();
  }

  // Where the sums of a warpgroup over `part` of the inputs lie in the block that adds them up, of
  // its rows of the tile: rows of tokens at once, in the order in which lanes have them.
  static __device__ __forceinline__ float* SumsOf(const ResidentParams& p, const Shared& shared,
                                                  int slot, int part, int row) {
    const int parts = gridDim.x << p.sharers_log2, rows = kBlockRows / gridDim.x;
    return shared.sums + ((slot * parts + part) * rows + row) * (p.tokens_at_once + kPadding);
  }

  // Sums of `kTokenStep` tokens to the blocks that add them up.
  static __device__ __forceinline__ void SendSums(const ResidentParams& p, const Shared& shared,
                                                  const float* acc, int token) {
    const int group = threadIdx.x / 128, warp_tile = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int rows = kBlockRows / gridDim.x;
    const int sharer = group & ((1 << p.sharers_log2) - 1);
    const int part = (blockIdx.x << p.sharers_log2) + sharer;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_tile * kWarpTileRows + 8 * half;
      float* sums = SumsOf(p, shared, group >> p.sharers_log2, part, row % rows + lane / 4) + token;
      const uint32_t rank = row / rows;
      const uint32_t barrier = ClusterAddress(&shared.barriers->ready, rank);
      StoreInCluster(ClusterAddress(sums + lane % 4 * 4, rank), barrier, acc[2 * half],
                     acc[2 * half + 1], acc[2 * half + 4], acc[2 * half + 5]);
    }
  }

  // Of the tokens from `first_token` on.
  static __device__ __forceinline__ void AddUp(const ResidentParams& p, const Shared& shared,
                                               const GemmSegment& gemm, int first_output,
                                               int first_token, float factor) {
    constexpr int kLaneTokens = kTokenStep / 4;
    const int parts = gridDim.x << p.sharers_log2, rows = kBlockRows / gridDim.x;
    const int row_pairs = rows * (kGroups >> p.sharers_log2) / 2;
    const int items = row_pairs * (p.tokens_at_once / kLaneTokens);
    const int part_stride = rows * (p.tokens_at_once + kPadding);
    for (int i = threadIdx.x; i < items; i += kThreads) {
      const int row = i % row_pairs * 2, slot = row / rows, share = i / row_pairs;
      const int n = first_output + slot * kBlockRows + blockIdx.x * rows + row % rows;
      const int token = first_token + share / 4 * kTokenStep + share % 4 * 2;
      if (token >= p.num_rows || n >= gemm.num_outputs) continue;
      const float* from = SumsOf(p, shared, slot, 0, row % rows) + share * kLaneTokens;
      float sums[2][kLaneTokens] = {};
#pragma unroll 4
      for (int part = 0; part < parts; ++part, from += part_stride) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float* of_row = from + r * (p.tokens_at_once + kPadding);
#pragma unroll
          for (int j = 0; j < kLaneTokens; j += 2) {
            const float2 pair = *reinterpret_cast<const float2*>(of_row + j);
            sums[r][j] += pair.x;
            sums[r][j + 1] += pair.y;
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kLaneTokens; ++j) {
        const int64_t m = token + j / 2 * 8 + j % 2;
        if (m >= p.num_rows) continue;
        WriteOutputs(gemm, m * gemm.num_outputs + n, sums[0][j] * factor, sums[1][j] * factor,
                     n + 1 < gemm.num_outputs);
      }
    }
  }

  static __device__ __forceinline__ void WriteOutputs(const GemmSegment& gemm, int64_t index,
                                                      float first, float second, bool both) {
    const bool together = gemm.num_outputs % 2 == 0;
    if (gemm.float_output) {
      float* output = static_cast<float*>(gemm.output) + index;
      if (together) {
        *reinterpret_cast<float2*>(output) = {first, second};
      } else {
        output[0] = first;
        if (both) output[1] = second;
      }
    } else {
      uint16_t* output = static_cast<uint16_t*>(gemm.output) + index;
      if (together) {
        *reinterpret_cast<uint32_t*>(output) =
            ToBfloat16(first) | uint32_t{ToBfloat16(second)} << 16;
      } else {
        output[0] = ToBfloat16(first);
        if (both) output[1] = ToBfloat16(second);
      }
    }
  }

  // Sums of a tile, from registers to memory.
  struct Exchange {
    uint32_t parity = 0;

    __device__ __forceinline__ void Run(const ResidentParams& p, const Shared& shared,
                                        const GemmSegment& gemm, int first_output, float factor,
                                        const float (&acc)[kTokens / 2], bool last_tile) {
#pragma unroll
      for (int first = 0; first < kTokens; first += kTokenStep) {
        if (first >= p.num_rows) break;
        const int from_first = first & (p.tokens_at_once - 1);
        if (from_first == 0) {
          WaitBarrier(&shared.barriers->taken, parity ^ 1);
          if (threadIdx.x == 0) {
            const int steps = CeilDiv(p.num_rows - first, kTokenStep);
            ArriveExpectingBytes(&shared.barriers->ready,
                                 kGroups * kBlockRows * 4 *
                                     min(p.tokens_at_once, steps * kTokenStep));
          }
        }
        SendSums(p, shared, acc + first / 2, from_first);
        const bool last = first + kTokenStep >= p.num_rows;
        if (from_first + kTokenStep < p.tokens_at_once && !last) continue;
        WaitBarrier(&shared.barriers->ready, parity);
        parity ^= 1;
        AddUp(p, shared, gemm, first_output, first - from_first, factor);
        if (last && last_tile) return;  // and do not signal to blocks that may have ended
        __syncwarp();
        const int lane = threadIdx.x % 32;
        if (lane < static_cast<int>(gridDim.x)) {
          SignalInCluster(ClusterAddress(&shared.barriers->taken, lane));
        }
      }
    }
  };

  // A cluster's tiles, which are of one format.
  template <WeightFormat format>
  static __device__ __forceinline__ void MultiplyTiles(const ResidentParams& p,
                                                       const ResidentParams::Part& part,
                                                       const Shared& shared) {
    constexpr int kBlocks = Ahead<format>::kBlocks;
    int tile = static_cast<int>(blockIdx.y) - part.first_cluster;
    const int first_input = p.blocks_per_row * static_cast<int>(blockIdx.x) /
                            static_cast<int>(gridDim.x);
    // The compiler learns that it is uniform.
    const uint32_t inputs = __shfl_sync(
        0xffffffffu,
        SharedAddress(shared.inputs) +
            (FirstBlock(p, threadIdx.x / 128) - first_input) * kInputBytes,
        0);
    Run<format> run(p, SegmentOf(p, part, tile), tile);
    Ahead<format> ahead;
    ahead.Load(run);
    Exchange exchange;
    int loaded = -1;
    for (;;) {
      const StreamSegment& segment = SegmentOf(p, part, tile);
      const int first_output =
          (tile - segment.first_tile) * (kGroups * kBlockRows) >> p.sharers_log2;
      const float factor = __ldg(segment.gemm.global_scale) * WeightTiles<format>::kUnscale;
      const int wanted =
          first_output / segment.outputs_per_group * 2 + segment.gemm.round_input;
      if (wanted != loaded) {
        LoadInputs(p, shared, wanted / 2, segment.gemm.round_input);
        if (loaded < 0) WaitForCluster();
        loaded = wanted;
      }
      const int next_tile = tile + part.num_clusters;
      const bool last = next_tile >= part.num_tiles;
      float acc[kTokens / 2] = {};
      uint32_t at = inputs;
      bool more = true;
      do {
        const int num_blocks = run.num_blocks;
        more = num_blocks > kBlocks;
        if (more) {
          run.Advance(kBlocks);
        } else if (last) {
          run.num_blocks = 0;
        } else {
          run = Run<format>(p, SegmentOf(p, part, next_tile), next_tile);
        }
        Multiply<format>(ahead, num_blocks, run, at, acc);
        at += kBlocks * kInputBytes;
      } while (more);
      exchange.Run(p, shared, segment.gemm, first_output, factor, acc, last);
      if (last) return;
      tile = next_tile;
    }
  }

  static __device__ __forceinline__ void Start(const ResidentParams& p) {
    extern __shared__ __align__(1024) uint8_t resident_shared[];
    const Shared shared(p, resident_shared);
    if (threadIdx.x == 0) {
      InitBarrier(&shared.barriers->ready, 1);
      InitBarrier(&shared.barriers->taken, gridDim.x * kThreads / 32);
      FenceBarrierInit();
    }
    __syncwarp();
    ArriveAtCluster();
    const auto is_mine = [](const ResidentParams::Part& part) {
      return static_cast<int>(blockIdx.y) < part.first_cluster + part.num_clusters;
    };
    int part = -1;
    (void)((is_mine(p.parts[++part]) && (MultiplyTiles<formats>(p, p.parts[part], shared), true)) ||
           ...);
  }
};

template <int kTokens, WeightFormat... formats>
__global__ void __launch_bounds__(ResidentKernel<kTokens, formats...>::kThreads, 1)
    ResidentGemm(const __grid_constant__ ResidentParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // elsewhere there is no wgmma, and the handler does not come here
  ResidentKernel<kTokens, formats...>::Start(params);
#endif
}

}  // namespace dsv4
