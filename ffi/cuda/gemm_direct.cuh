// Products with up to 64 rows of input: weights pass once from memory into registers, several
// loads ahead, where they are decoded for mma.sync; the inputs stay in shared memory.
//
// A unit is a run of warp tiles of outputs. A block of warps works on several units at a time, a
// tile; the warps of a unit take turns at its blocks of 128 inputs. The blocks of a cluster share
// the inputs out among themselves. All sums are added up in a fixed order.
#pragma once

#include "cluster.cuh"
#include "gemm_direct_params.cuh"
#include "moe_hopper.cuh"
#include "round_input.cuh"
#include "warp_products.cuh"

namespace dsv4 {

DSV4_HOST_DEVICE constexpr int LogOf(int power) { return power == 1 ? 0 : 1 + LogOf(power / 2); }

// `kTokenTiles` of 8 rows of input; `kChunks` of FP4 or FP8 weights at a time to each warp.
template <int kWarps, int kTokenTiles, int kChunks, WeightFormat... formats>
struct DirectKernel {
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kChunksAhead = 128 / kWarps;  // as registers allow
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kBlockBytes = kBlockColumns * 2;  // of inputs of a row
  static constexpr int kInputPadding = 16, kPadding = 4;  // against bank conflicts
  static constexpr int kParts = 4;                        // of the inputs

  static DSV4_HOST_DEVICE constexpr int RowTiles(WeightFormat format) {
    return kChunks < NumChunks(format) ? 1 : kChunks / NumChunks(format);
  }
  static constexpr int MostRowTiles() {
    int most = 0;
    for (const int tiles : {RowTiles(formats)...}) most = tiles > most ? tiles : most;
    return most;
  }
  static constexpr int kTokenStride = MostRowTiles() * kWarpTileRows + kPadding;
  static constexpr int kPartialFloats = kTokens * kTokenStride;

  static DSV4_HOST_DEVICE constexpr int TileRows(WeightFormat format, int unit_warps_log2) {
    return kWarps * RowTiles(format) * kWarpTileRows >> unit_warps_log2;
  }

  struct Shared {
    uint64_t* ready;   // sums from the cluster's blocks, of even and of odd turns; two are spare
    uint64_t* loaded;  // parts of the inputs
    uint8_t* inputs;   // [tokens, blocks of 128 and padding]
    int row_bytes;
    float* input_scales;  // of inputs that are codes, [blocks, tokens]
    float* partial;       // [warps, tokens, rows of a unit and padding]
    float* incoming;      // [2, blocks, tokens, rows that a block adds up]

    __device__ __forceinline__ Shared(const DirectParams& p, uint8_t* memory)
        : ready(reinterpret_cast<uint64_t*>(memory)),
          loaded(ready + kParts),
          inputs(memory + 128),
          row_bytes(p.max_blocks * kBlockBytes + kInputPadding),
          input_scales(reinterpret_cast<float*>(inputs + kTokens * row_bytes)),
          partial(input_scales + p.max_blocks * kTokens),
          incoming(partial + kWarps * kPartialFloats) {}
  };

  static constexpr int SharedBytes(int max_blocks, int ranks, int unit_warps_log2) {
    const int rows = kWarps * MostRowTiles() * kWarpTileRows >> unit_warps_log2;
    return 128 + kTokens * (max_blocks * (kBlockBytes + 4) + kInputPadding) +
           kWarps * kPartialFloats * 4 + (ranks > 1 ? 2 * rows * kTokens * 4 : 0);
  }

  // Outputs of some rows of input. Those of the same outputs follow each other.
  struct Tile {
    const DirectSegment& segment;
    int first_row, first_token;
  };

  template <WeightFormat format>
  static __device__ __forceinline__ Tile TileOf(const DirectParams& p,
                                                const DirectParams::Part& part, int tile) {
    const int row_tile = tile >> p.groups_log2;
    int segment = part.first_segment;
    while (segment + 1 < part.end_segment && row_tile >= p.segments[segment + 1].first_tile) {
      ++segment;
    }
    return {p.segments[segment],
            (row_tile - p.segments[segment].first_tile) * TileRows(format, p.unit_warps_log2),
            (tile & ((1 << p.groups_log2) - 1)) * kTokens};
  }

  // The blocks of 128 inputs that this block of threads multiplies.
  static __device__ __forceinline__ int FirstBlock(const DirectParams& p, int rank) {
    return p.blocks_per_row * rank >> p.ranks_log2;
  }
  static __device__ __forceinline__ int NumBlocks(const DirectParams& p) {
    return FirstBlock(p, blockIdx.x + 1) - FirstBlock(p, blockIdx.x);
  }

  // Weights that a warp multiplies: of one unit, every so many blocks of 128 inputs.
  template <WeightFormat format>
  struct Run {
    static constexpr int kRowTiles = RowTiles(format);
    static constexpr int kTileCodes = CodeBytes(format) / kWarpTilesPerBlock;

    const uint8_t* codes;
    const uint8_t* scales;
    int num_turns;

    __device__ __forceinline__ Run(const DirectParams& p, const Tile& tile) {
      const GemmSegment& gemm = tile.segment.gemm;
      const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
      const int first = warp & ((1 << p.unit_warps_log2) - 1);
      const int row =
          tile.first_row + (warp >> p.unit_warps_log2) * (kRowTiles * kWarpTileRows);
      num_turns = row < gemm.num_outputs
                      ? (NumBlocks(p) - first + (1 << p.unit_warps_log2) - 1) >> p.unit_warps_log2
                      : 0;
      const int64_t block = int64_t{row / kBlockRows} * p.blocks_per_row +
                            FirstBlock(p, blockIdx.x) + first;
      const int warp_tile = row % kBlockRows / kWarpTileRows;
      codes = gemm.codes + block * CodeBytes(format) + warp_tile * kTileCodes + lane * 16;
      scales = gemm.scales + block * ScaleBytes(format);
      if constexpr (format == WeightFormat::kMxfp4 || format == WeightFormat::kNvfp4) {
        scales += (warp_tile * 32 + lane) * (ScaleBytes(format) / 128);
      }
    }

    __device__ __forceinline__ void Advance(const DirectParams& p, int turns) {
      codes += turns * CodeBytes(format) << p.unit_warps_log2;
      scales += turns * ScaleBytes(format) << p.unit_warps_log2;
      num_turns -= turns;
    }
  };

  // Of the next turns, in registers.
  template <WeightFormat format>
  struct Ahead {
    using Tiles = WeightTiles<format>;
    static constexpr int kRowTiles = RowTiles(format), kTileChunks = NumChunks(format);
    static constexpr int kTurns = kChunksAhead / (kRowTiles * kTileChunks);
    static constexpr int kTileScales =
        format == WeightFormat::kFp8Block ? 0 : ScaleBytes(format) / kWarpTilesPerBlock;

    uint4 chunks[kTurns][kRowTiles][kTileChunks];
    typename Tiles::RawScale scales[kTurns][kRowTiles];

    __device__ __forceinline__ void LoadScales(const DirectParams& p, const Run<format>& run,
                                               int turn) {
      if (turn >= run.num_turns) return;
      const uint8_t* from = run.scales + (turn * ScaleBytes(format) << p.unit_warps_log2);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        // Of this lane and warp tile.
        scales[turn][r] = Tiles::LoadScale(from + r * kTileScales, 0, 0);
      }
    }

    __device__ __forceinline__ void LoadChunk(const DirectParams& p, const Run<format>& run,
                                              int turn, int r, int chunk) {
      if (turn >= run.num_turns) return;
      chunks[turn][r][chunk] =
          LoadStreamed(run.codes + (turn * CodeBytes(format) << p.unit_warps_log2) +
                       (r * kTileChunks + chunk) * kChunkBytes);
    }

    __device__ __forceinline__ void LoadTurn(const DirectParams& p, const Run<format>& run,
                                             int turn) {
      LoadScales(p, run, turn);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int chunk = 0; chunk < kTileChunks; ++chunk) LoadChunk(p, run, turn, r, chunk);
      }
    }

    __device__ __forceinline__ void Load(const DirectParams& p, const Run<format>& run) {
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) LoadTurn(p, run, turn);
    }
  };

  // By a warp for each part: the block's share of the inputs of one group.
  static __device__ __forceinline__ void CopyInputs(const DirectParams& p, const Shared& shared,
                                                    int group, int first_token) {
    const int part = threadIdx.x / 32, token = threadIdx.x % 32;
    const int first_block = FirstBlock(p, blockIdx.x), first = part << p.part_log2;
    const int begin = (first_block + first) * kBlockColumns;
    const int last = min(first + (1 << p.part_log2), NumBlocks(p));
    const int end = min(p.width, (first_block + last) * kBlockColumns);
    const int num_tokens = min(kTokens, p.num_rows - first_token);
    const uint32_t bytes = (end - begin) * 2;
    if (part < kParts && begin < end && token < num_tokens) {
      if (token == 0) ArriveExpectingBytes(shared.loaded + part, num_tokens * bytes);
      LoadBulk(shared.inputs + token * shared.row_bytes + first * kBlockBytes,
               p.x + (int64_t{first_token + token} * p.row_stride + group * p.width + begin), bytes,
               shared.loaded + part);
    }
  }

  // Zeros behind the last inputs of the rows, up to a whole block.
  static __device__ __forceinline__ void PadInputs(const DirectParams& p, const Shared& shared) {
    const int begin = FirstBlock(p, blockIdx.x) * kBlockColumns;
    const int end = FirstBlock(p, blockIdx.x + 1) * kBlockColumns;
    const int missing = (end - p.width) / 8;
#pragma unroll 1
    for (int i = threadIdx.x; i < missing * kTokens; i += kThreads) {
      reinterpret_cast<uint4*>(shared.inputs + i / missing * shared.row_bytes)
          [(p.width - begin) / 8 + i % missing] = {};
    }
  }

  // Rounds what has been copied. FP8 weights meet rounded inputs as float16.
  template <WeightFormat format>
  static __device__ __forceinline__ void RoundInputs(const DirectParams& p, const Shared& shared,
                                                     uint32_t parity) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int num_items = NumBlocks(p) * kTokenTiles;
#pragma unroll 1
    for (int item = warp; item < num_items; item += kWarps) {
      const int token = item % kTokenTiles * 8 + lane / 4, block = item / kTokenTiles;
      WaitBarrier(shared.loaded + (block >> p.part_log2), parity);
      uint4* inputs = reinterpret_cast<uint4*>(shared.inputs + token * shared.row_bytes +
                                               block * kBlockBytes + lane % 4 * 64);
      uint32_t words[16];
      uint32_t amax = 0;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        words[i] = (&inputs[i / 4].x)[i % 4];
        amax = MaxMagnitude(amax, words[i]);
      }
      amax = max(amax & 0xffffu, amax >> 16);
      amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, 1));
      amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, 2));
      const uint32_t scale = InputScale(amax);
#pragma unroll
      for (int i = 0; i < 16; i += 2) {
        if constexpr (format == WeightFormat::kFp8Block) {
          const uint2 halves = HalvesOfCodes(InputCodes(words[i], words[i + 1], scale));
          words[i] = halves.x;
          words[i + 1] = halves.y;
        } else {
          words[i] = RoundInput(words[i], scale);
          words[i + 1] = RoundInput(words[i + 1], scale);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        inputs[i] = {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
      }
      if (format == WeightFormat::kFp8Block && lane % 4 == 0) {
        shared.input_scales[block * kTokens + token] = DecodeE8m0(scale);
      }
    }
    __syncthreads();
  }

  template <WeightFormat format>
  using Accumulators = float[RowTiles(format)][kTokenTiles][4];

  // Products of a turn, which is in registers; meanwhile that of `next` arrives.
  template <WeightFormat format, bool kCodes>
  static __device__ __forceinline__ void Multiply(const DirectParams& p, Ahead<format>& ahead,
                                                  int turn, const Run<format>& next,
                                                  const Shared& shared, int block,
                                                  Accumulators<format>& acc) {
    using Tiles = WeightTiles<format>;
    constexpr int kRowTiles = RowTiles(format), kSteps = Tiles::kStepsPerChunk;
    Accumulators<format> sums = {};
    typename Tiles::RawScale raw[kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) raw[r] = ahead.scales[turn][r];
    ahead.LoadScales(p, next, turn);
    const int lane = threadIdx.x % 32;
    const uint8_t* inputs =
        shared.inputs + lane / 4 * shared.row_bytes + block * kBlockBytes + lane % 4 * 64;
#pragma unroll
    for (int step = 0; step < kStepsPerBlock; ++step) {
      uint2 b[kTokenTiles];
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        b[t] = reinterpret_cast<const uint2*>(inputs + t * 8 * shared.row_bytes)[step];
      }
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const uint4& chunk = ahead.chunks[turn][r][step / kSteps];
        Fragment a;
        if constexpr (kCodes) {
          const uint2 first = HalvesOfCodes((&chunk.x)[step % kSteps * 2]);
          const uint2 second = HalvesOfCodes((&chunk.x)[step % kSteps * 2 + 1]);
          a = {{first.x, second.x, first.y, second.y}};
        } else {
          a = Tiles::Decode(chunk, step % kSteps, Tiles::Scales(raw[r], step / kSteps));
        }
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          if constexpr (kCodes) {
            MultiplyF16(sums[r][t], a, b[t].x, b[t].y);
          } else {
            MultiplyBf16(acc[r][t], a, b[t].x, b[t].y);
          }
        }
        if (step % kSteps == kSteps - 1) ahead.LoadChunk(p, next, turn, r, step / kSteps);
      }
    }
    if constexpr (kCodes) {
      // As `Scales` of the decoded weights: short of `kUnscale`, and infinite from 2^38 on.
      const float scale = __uint_as_float((raw[0] + 90u) << 23) * 0x1p-120f;
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        const float2 of_tokens = *reinterpret_cast<const float2*>(
            shared.input_scales + block * kTokens + t * 8 + lane % 4 * 2);
        const float factors[2] = {of_tokens.x * scale, of_tokens.y * scale};
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[r][t][i] += sums[r][t][i] * factors[i % 2];
        }
      }
    }
  }

  static __device__ __forceinline__ void Add(float4& sum, const float* from) {
    const float4 x = *reinterpret_cast<const float4*>(from);
    sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
  }

  // Adds up the partial sums of the warps and of the cluster and writes the tile.
  template <WeightFormat format>
  static __device__ __forceinline__ void Finish(const DirectParams& p, const Tile& tile,
                                                float factor, const Shared& shared,
                                                uint32_t turn) {
    constexpr int kUnitRows = RowTiles(format) * kWarpTileRows;
    const int unit_warps = 1 << p.unit_warps_log2, ranks = 1 << p.ranks_log2;
    constexpr int kMostRowsLog2 = LogOf(kWarps * kUnitRows);
    const int rows_log2 = kMostRowsLog2 - p.unit_warps_log2, rows = 1 << rows_log2;
    const int share_log2 = rows_log2 - p.ranks_log2, share = 1 << share_log2;
    const GemmSegment& gemm = tile.segment.gemm;
    const int num_tokens = min(kTokens, p.num_rows - tile.first_token);
    float* incoming = shared.incoming + turn % 2 * (rows * kTokens);
    uint64_t* ready = shared.ready + turn % 2;
    __syncthreads();
    if (ranks > 1 && threadIdx.x == 0) ArriveExpectingBytes(ready, rows * num_tokens * 4);
#pragma unroll 1
    for (int i = threadIdx.x * 4; i < rows * num_tokens; i += kThreads * 4) {
      const int row = i & (rows - 1), token = i >> rows_log2;
      const float* from = shared.partial + row / kUnitRows * unit_warps * kPartialFloats +
                          token * kTokenStride + row % kUnitRows;
      float4 sum = {};
#pragma unroll 4
      for (int w = 0; w < unit_warps; ++w) Add(sum, from + w * kPartialFloats);
      sum = {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor};
      if (ranks > 1) {
        const uint32_t rank = row >> share_log2;
        const float* to =
            incoming + (blockIdx.x * kTokens + token) * share + (row & (share - 1));
        StoreInCluster(ClusterAddress(to, rank), ClusterAddress(ready, rank), sum.x, sum.y, sum.z,
                       sum.w);
      } else if (tile.first_row + row < gemm.num_outputs) {
        WriteOutputs(gemm, tile.first_token + token, tile.first_row + row, sum);
      }
    }
    if (ranks == 1) return;
    WaitBarrier(ready, turn / 2 % 2);
#pragma unroll 1
    for (int i = threadIdx.x * 4; i < share * num_tokens; i += kThreads * 4) {
      const int row = i & (share - 1), token = i >> share_log2;
      float4 sum = {};
#pragma unroll 2
      for (int rank = 0; rank < ranks; ++rank) {
        Add(sum, incoming + (rank * kTokens + token) * share + row);
      }
      const int output = tile.first_row + blockIdx.x * share + row;
      if (output < gemm.num_outputs) WriteOutputs(gemm, tile.first_token + token, output, sum);
    }
  }

  // A cluster's tiles, which are of one format.
  template <WeightFormat format>
  static __device__ __forceinline__ void MultiplyTiles(const DirectParams& p,
                                                       const DirectParams::Part& part,
                                                       const Shared& shared) {
    constexpr int kTurns = Ahead<format>::kTurns, kRowTiles = RowTiles(format);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = warp & ((1 << p.unit_warps_log2) - 1);
    const auto group_of = [&](const Tile& tile) {
      return p.row_stride == p.width ? 0 : tile.first_row / tile.segment.outputs_per_group;
    };
    int index = static_cast<int>(blockIdx.y) - part.first_cluster;
    const Tile first_tile = TileOf<format>(p, part, index);
    // Ahead of the weights, behind which they would queue.
    CopyInputs(p, shared, group_of(first_tile), first_tile.first_token);
    Run<format> run(p, first_tile);
    Ahead<format> ahead;
    ahead.Load(p, run);
    PadInputs(p, shared);
    __syncthreads();
    if (p.ranks_log2 > 0) WaitForCluster();
    int held = -1;
    uint32_t parity = 1;
    for (uint32_t tiles_done = 0;; ++tiles_done) {
      const Tile tile = TileOf<format>(p, part, index);
      const bool round = tile.segment.gemm.round_input;
      const int group = group_of(tile);
      const int wanted = (group * 2 + round) * kMaxDirectTokens + tile.first_token;
      const float factor = __ldg(tile.segment.gemm.global_scale) * WeightTiles<format>::kUnscale;
      const bool copied = wanted != held;
      if (copied) {
        if (held >= 0) {
          FenceAsync();
          CopyInputs(p, shared, group, tile.first_token);
        }
        parity ^= 1;
        if (round) RoundInputs<format>(p, shared, parity);
        held = wanted;
      }
      const int next_index = index + part.num_clusters;
      const bool last = next_index >= part.num_tiles;
      Accumulators<format> acc = {};
      int block = first;
      bool more = true;
      do {
        const int num_turns = run.num_turns;
        more = num_turns > kTurns;
        if (more) {
          run.Advance(p, kTurns);
        } else if (last) {
          run.num_turns = 0;
        } else {
          run = Run<format>(p, TileOf<format>(p, part, next_index));
        }
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn, block += 1 << p.unit_warps_log2) {
          if (turn < num_turns) {
            if (copied) WaitBarrier(shared.loaded + (block >> p.part_log2), parity);
            if (format == WeightFormat::kFp8Block && round) {
              Multiply<format, format == WeightFormat::kFp8Block>(p, ahead, turn, run, shared,
                                                                  block, acc);
            } else {
              Multiply<format, false>(p, ahead, turn, run, shared, block, acc);
            }
          } else {
            ahead.LoadTurn(p, run, turn);
          }
        }
      } while (more);
      float* partial = shared.partial + warp * kPartialFloats;
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
      Finish<format>(p, tile, factor, shared, tiles_done);
      if (last) return;
      __syncthreads();
      index = next_index;
    }
  }

  static __device__ __forceinline__ void Start(const DirectParams& p) {
    extern __shared__ __align__(128) uint8_t direct_shared[];
    const Shared shared(p, direct_shared);
    const int warp = threadIdx.x / 32;
    if (warp < kParts && threadIdx.x % 32 == 0) {
      InitBarrier(shared.loaded + warp, 1);
      InitBarrier(shared.ready + warp, 1);
      FenceBarrierInit();
    }
    __syncwarp();
    if (p.ranks_log2 > 0) ArriveAtCluster();
    const auto is_mine = [](const DirectParams::Part& part) {
      return static_cast<int>(blockIdx.y) < part.first_cluster + part.num_clusters;
    };
    int part = -1;
    (void)((is_mine(p.parts[++part]) && (MultiplyTiles<formats>(p, p.parts[part], shared), true)) ||
           ...);
  }
};

template <int kWarps, int kTokenTiles, int kChunks, WeightFormat... formats>
__global__ void __launch_bounds__(kWarps * 32, 1)
    DirectGemm(const __grid_constant__ DirectParams params) {
  DirectKernel<kWarps, kTokenTiles, kChunks, formats...>::Start(params);
}

}  // namespace dsv4
