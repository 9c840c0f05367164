// Products of rows with tiled weights on tcgen05: the weights are decoded on the way.
//
// Weights are operand A (128 lanes of the accumulator), rows are operand B. One warp copies blocks
// of weights as they are and tiles of rows; eight warps decode weights from one ring of stages
// into the other; one thread issues products into one of two accumulators, four warps store the
// other. Blocks are persistent. Where few tiles would leave multiprocessors idle, the blocks of a
// cluster take slices of K (cluster_sums_sm100.cuh).
#pragma once

#include "cluster_sums_sm100.cuh"
#include "decoded_inputs_sm100.cuh"
#include "decoded_weights_sm100.cuh"
#include "mbarrier.cuh"
#include "tcgen05.cuh"
#include "tma.cuh"

namespace dsv4::sm100 {

struct TiledMatrix {
  const uint8_t* codes;  // a stack, one for each group of rows
  const uint8_t* scales;
  const float* global_scale;
};

struct DecodedGemm {
  // Lanes 0..63 and 64..127 of a tile: the same matrix, whose blocks they take in turn; or, in
  // pairs, two of the same size, whose outputs alternate every 16 lanes.
  TiledMatrix weights[2];
  const uint8_t* inputs;  // tiles of the rows
  RowBlocks rows;
  int32_t num_outputs, width;
  int32_t num_input_groups, outputs_per_input_group;
};

constexpr uint32_t kCopyWarp = 0, kProductWarp = 1, kFirstSumsWarp = 2, kFirstDecodeWarp = 6;
constexpr uint32_t kDecodeWarps = 8;
constexpr uint32_t kDecodedThreads = 32 * (kFirstDecodeWarp + kDecodeWarps);

template <typename T>
struct DecodedShared {
  alignas(8) uint64_t raw_full[T::kRawStages], raw_empty[T::kRawStages];
  uint64_t full[T::kStages], empty[T::kStages];
  uint64_t accumulated[T::kAccumulators], stored[T::kAccumulators];
  uint64_t exchanged;
  uint32_t tensor_memory;
};

// The parts of the stages in shared memory.
template <typename T>
struct DecodedStages {
  uint8_t* base;

  __device__ explicit DecodedStages(uint8_t* dynamic)
      : base(dynamic + (T::kAlignment - SharedAddress(dynamic) % T::kAlignment) % T::kAlignment) {}
  __device__ uint8_t* Weights(uint32_t slot) const { return base + slot * T::kStageBytes; }
  __device__ uint8_t* Rows(uint32_t slot) const { return Weights(slot) + T::kWeightBytes; }
  __device__ uint8_t* WeightScales(uint32_t slot) const { return Rows(slot) + T::kRowBytes; }
  __device__ uint8_t* RowScales(uint32_t slot) const {
    return WeightScales(slot) + T::kScaleBlockBytes;
  }
  __device__ uint8_t* RawCodes(uint32_t slot, int32_t side) const {
    return base + T::kStages * T::kStageBytes + slot * T::kRawBytes + side * T::kCodeBytes;
  }
  __device__ uint8_t* RawScales(uint32_t slot, int32_t side) const {
    return RawCodes(slot, 2) + side * T::kScaleBytes;
  }
  __device__ uint8_t* RawRowScales(uint32_t slot) const { return RawScales(slot, 2); }
  __device__ float* Exchange() const {
    return reinterpret_cast<float*>(RawCodes(T::kRawStages, 0));
  }
};

// A tile of the output and where its weights lie.
struct DecodedOutput {
  RowBlock rows;
  int32_t first_output;  // in pairs, of either matrix
  int32_t input_group;
  int64_t first_block;   // the first block of K of lanes 0..63
  int32_t num_sides;     // 1 where the matrix ends before lane 64
};

// The tiles of this cluster, those of a row block after each other.
template <int32_t kRows, bool kPairs>
class DecodedWalk {
 public:
  __device__ explicit DecodedWalk(const DecodedGemm& gemm)
      : gemm_(gemm),
        columns_((gemm.width + kBlockColumns - 1) / kBlockColumns),
        row_blocks_((gemm.num_outputs + kBlockRows - 1) / kBlockRows),
        tiles_(kPairs ? row_blocks_ : (row_blocks_ + 1) / 2),
        count_(int64_t{gemm.rows.Count(kRows)} * tiles_),
        next_(blockIdx.x / ClusterSize()) {}

  __device__ bool Next(DecodedOutput& tile) {
    if (next_ >= count_) return false;
    const int32_t index = static_cast<int32_t>(next_ % tiles_);
    tile.rows = gemm_.rows.At(static_cast<int32_t>(next_ / tiles_), kRows);
    const int32_t first = kPairs ? index : 2 * index;
    tile.first_output = first * kBlockRows;
    tile.input_group = tile.first_output / gemm_.outputs_per_input_group;
    tile.first_block = (int64_t{tile.rows.group} * row_blocks_ + first) * columns_;
    tile.num_sides = kPairs || first + 1 < row_blocks_ ? 2 : 1;
    next_ += gridDim.x / ClusterSize();
    return true;
  }

  // The first block of K of a side of a tile: in pairs at the same place of the other matrix.
  __device__ int64_t FirstBlock(const DecodedOutput& tile, int32_t side) const {
    return tile.first_block + (kPairs ? 0 : side * columns_);
  }

  // The columns of K that are this block's part of every tile.
  __device__ int32_t Begin() const { return ClusterRank() * columns_ / ClusterSize(); }
  __device__ int32_t End() const { return (ClusterRank() + 1) * columns_ / ClusterSize(); }
  __device__ int32_t columns() const { return columns_; }

 private:
  const DecodedGemm& gemm_;
  int32_t columns_, row_blocks_, tiles_;
  int64_t count_, next_;
};

template <WeightFormat format, int32_t kRows, Operands operands, bool kPairs>
struct DecodedKernel {
  using T = DecodedTile<format, kRows, operands>;
  using Tiles = WeightTiles<format>;
  using RawScale = typename Tiles::RawScale;
  using Shared = DecodedShared<T>;
  using Walk = DecodedWalk<kRows, kPairs>;

  const DecodedGemm& gemm;
  Shared& shared;
  DecodedStages<T> stages;

  // One thread.
  __device__ void Copy() const {
    RingPosition<T::kRawStages> raw;
    RingPosition<T::kStages> ring;
    Walk walk(gemm);
    for (DecodedOutput tile; walk.Next(tile);) {
      const int32_t atom_bytes = tile.rows.num_rows * T::kAtomBytes;
      const int32_t scale_bytes = T::kCodes ? (tile.rows.num_rows + 3) / 4 * 16 : 0;
      for (int32_t k = walk.Begin(); k < walk.End(); ++k) {
        const uint8_t* rows = gemm.inputs + InputTileOffset(tile.rows, gemm.num_input_groups,
                                                            tile.input_group, walk.columns(), k);
        uint64_t* raw_full = &shared.raw_full[raw.slot];
        WaitBarrier(&shared.raw_empty[raw.slot], raw.parity ^ 1);
        ArriveExpectingBytes(raw_full, tile.num_sides * (T::kCodeBytes + T::kScaleBytes) +
                                           scale_bytes);
        for (int32_t side = 0; side < tile.num_sides; ++side) {
          const TiledMatrix& matrix = gemm.weights[kPairs ? side : 0];
          const int64_t block = walk.FirstBlock(tile, side) + k;
          LoadBulk(stages.RawCodes(raw.slot, side), matrix.codes + block * T::kCodeBytes,
                   T::kCodeBytes, raw_full);
          if constexpr (T::kLaneScales) {
            LoadBulk(stages.RawScales(raw.slot, side), matrix.scales + block * T::kScaleBytes,
                     T::kScaleBytes, raw_full);
          }
        }
        if constexpr (T::kCodes) {
          LoadBulk(stages.RawRowScales(raw.slot), rows + atom_bytes, scale_bytes, raw_full);
        }
        raw.Advance();

        uint64_t* full = &shared.full[ring.slot];
        WaitBarrier(&shared.empty[ring.slot], ring.parity ^ 1);
        ArriveExpectingBytes(full, T::kAtoms * atom_bytes);
        for (int32_t atom = 0; atom < T::kAtoms; ++atom) {
          LoadBulk(stages.Rows(ring.slot) + atom * kRows * T::kAtomBytes, rows + atom * atom_bytes,
                   atom_bytes, full);
        }
        ring.Advance();
      }
    }
  }

  // Eight warps, each 16 outputs.
  __device__ void Decode() const {
    const int32_t warp = threadIdx.x / 32 - kFirstDecodeWarp, lane = threadIdx.x % 32;
    const int32_t side = warp / kWarpTilesPerBlock, warp_tile = warp % kWarpTilesPerBlock;
    const int32_t first_lane = kPairs ? 32 * warp_tile + 16 * side : 16 * warp;
    RingPosition<T::kRawStages> raw;
    RingPosition<T::kStages> ring;
    Walk walk(gemm);
    for (DecodedOutput tile; walk.Next(tile);) {
      const int32_t scaled_side = min(side, tile.num_sides - 1);  // one that exists
      const uint8_t* block_scales =
          gemm.weights[kPairs ? side : 0].scales + walk.FirstBlock(tile, scaled_side);
      // A scale for all lanes is read ahead.
      RawScale scale = {}, next = {};
      if constexpr (!T::kLaneScales) next = Tiles::LoadScale(block_scales + walk.Begin(), 0, 0);
      for (int32_t k = walk.Begin(); k < walk.End(); ++k, raw.Advance(), ring.Advance()) {
        if constexpr (!T::kLaneScales) {
          scale = next;
          next = Tiles::LoadScale(block_scales + min(k + 1, walk.End() - 1), 0, 0);
        }
        WaitBarrier(&shared.raw_full[raw.slot], raw.parity);
        if constexpr (T::kLaneScales) {
          scale = Tiles::LoadScale(stages.RawScales(raw.slot, side), warp_tile, lane);
        }
        const LaneWeights<format> weights(stages.RawCodes(raw.slot, side), scale, warp_tile, lane,
                                          !T::kCodes && LaneWeights<format>::Flipped(lane % 4));
        const int32_t row = threadIdx.x - 32 * kFirstDecodeWarp;
        uint32_t row_scale = 0;
        if (T::kCodes && row < kRows) {
          row_scale = reinterpret_cast<const uint32_t*>(stages.RawRowScales(raw.slot))[row];
        }
        __syncwarp();
        if (lane == 0) Arrive(&shared.raw_empty[raw.slot]);

        WaitBarrier(&shared.empty[ring.slot], ring.parity ^ 1);
        if constexpr (T::kCodes) {
          weights.StoreCodes(stages.Weights(ring.slot), stages.WeightScales(ring.slot),
                             first_lane + lane / 4, lane % 4);
          if (row < kRows) *ScaleWord(stages.RowScales(ring.slot), row) = row_scale;
        } else {
          weights.StoreBfloat16(stages.Weights(ring.slot), first_lane + lane / 4, lane % 4);
        }
        FenceAsyncProxy();
        __syncwarp();
        if (lane == 0) Arrive(&shared.full[ring.slot]);
      }
    }
  }

  // One thread.
  __device__ void Multiply() const {
    const uint32_t weight_scales = shared.tensor_memory + T::kWeightScaleColumn;
    const uint32_t row_scales = shared.tensor_memory + T::kRowScaleColumn;
    RingPosition<T::kStages> ring;
    RingPosition<T::kAccumulators> accumulators;
    Walk walk(gemm);
    for (DecodedOutput tile; walk.Next(tile); accumulators.Advance()) {
      const uint32_t accumulator = shared.tensor_memory + accumulators.slot * kRows;
      const uint32_t columns = (tile.rows.num_rows + 15) / 16 * 16;
      WaitBarrier(&shared.stored[accumulators.slot], accumulators.parity ^ 1);
      tcgen05::FenceAfterSync();
      for (int32_t k = walk.Begin(); k < walk.End(); ++k, ring.Advance()) {
        WaitBarrier(&shared.full[ring.slot], ring.parity);
        tcgen05::FenceAfterSync();
        if constexpr (T::kCodes) {
          tcgen05::CopyScaleBlock(weight_scales, stages.WeightScales(ring.slot));
          tcgen05::CopyScaleBlock(row_scales, stages.RowScales(ring.slot));
        }
#pragma unroll
        for (int32_t step = 0; step < T::kSteps; ++step) {
          constexpr int32_t kStepsPerAtom = T::kAtomBytes / T::kStepBytes;
          const int32_t atom = step / kStepsPerAtom, byte = step % kStepsPerAtom * T::kStepBytes;
          const uint64_t a = Descriptor(stages.Weights(ring.slot), atom * kLanes, byte);
          const uint64_t b = Descriptor(stages.Rows(ring.slot), atom * kRows, byte);
          const bool accumulate = k > walk.Begin() || step > 0;
          if constexpr (T::kCodes) {
            tcgen05::MultiplyMxfp8(accumulator, a, b,
                                   tcgen05::Mxfp8Instruction(kLanes, columns, step), weight_scales,
                                   row_scales, accumulate);
          } else {
            tcgen05::MultiplyBfloat16(accumulator, a, b,
                                      tcgen05::Bfloat16Instruction(kLanes, columns), accumulate);
          }
        }
        tcgen05::Commit(&shared.empty[ring.slot]);
      }
      tcgen05::Commit(&shared.accumulated[accumulators.slot]);
    }
  }

  static __device__ __forceinline__ uint64_t Descriptor(const uint8_t* operand, int32_t first_row,
                                                        int32_t byte) {
    constexpr int32_t kEightRows = 8 * T::kAtomBytes;
    return tcgen05::MatrixDescriptor(operand + first_row * T::kAtomBytes + byte, kEightRows,
                                     tcgen05::Swizzle::k128Bytes);
  }

  // Four warps. The sink is called with (tile, row in the tile, output, value), in pairs with both
  // matrices' values.
  template <typename Sink>
  __device__ void Store(const Sink& sink) const {
    const int32_t first_lane = threadIdx.x / 32 % 4 * 32;  // a warp reaches only its own lanes
    const int32_t lane = first_lane + threadIdx.x % 32;
    RingPosition<T::kAccumulators> accumulators;
    Walk walk(gemm);
    for (DecodedOutput tile; walk.Next(tile); accumulators.Advance()) {
      const uint32_t accumulator = shared.tensor_memory +
                                   (static_cast<uint32_t>(first_lane) << tcgen05::kLaneShift) +
                                   accumulators.slot * kRows;
      const int32_t side = kPairs ? lane / 16 % 2 : 0;
      const int32_t output = tile.first_output + (kPairs ? lane / 32 * 16 + lane % 16 : lane);
      const float factor = gemm.weights[side].global_scale[tile.rows.group] *
                           (T::kCodes ? 1.0f : WeightTiles<format>::kUnscale);
      const auto finish = [&](int32_t column, float sum) {
        const float value = sum * factor;
        const bool inside = column < tile.rows.num_rows && output < gemm.num_outputs;
        if constexpr (kPairs) {
          const float other = __shfl_xor_sync(0xffffffffu, value, 16);
          if (inside && side == 0) sink(tile.rows, column, output, value, other);
        } else {
          if (inside) sink(tile.rows, column, output, value);
        }
      };
      WaitBarrier(&shared.accumulated[accumulators.slot], accumulators.parity);
      tcgen05::FenceAfterSync();
      if (T::kCanSplit && ClusterSize() > 1) {
        if constexpr (T::kCanSplit) {
          ExchangeSums<kRows>(&shared.exchanged, stages.Exchange(), accumulator, finish);
        }
      } else {
        for (int32_t first = 0; first < kRows; first += 32) {
          float sums[32];
          tcgen05::LoadColumns(accumulator + first, sums);
#pragma unroll
          for (int32_t i = 0; i < 32; ++i) finish(first + i, sums[i]);
        }
      }
      tcgen05::FenceBeforeSync();
      Arrive(&shared.stored[accumulators.slot]);
    }
  }

  __device__ void InitBarriers() const {
    for (int32_t i = 0; i < T::kRawStages; ++i) {
      InitBarrier(&shared.raw_full[i], 1);
      InitBarrier(&shared.raw_empty[i], kDecodeWarps);
    }
    for (int32_t i = 0; i < T::kStages; ++i) {
      InitBarrier(&shared.full[i], 1 + kDecodeWarps);
      InitBarrier(&shared.empty[i], 1);
    }
    for (int32_t i = 0; i < T::kAccumulators; ++i) {
      InitBarrier(&shared.accumulated[i], 1);
      InitBarrier(&shared.stored[i], kStoreThreads);
    }
    InitBarrier(&shared.exchanged, ClusterSize() * kStoreThreads);
    FenceBarrierInit();
  }

  template <typename Sink>
  __device__ void Run(const Sink& sink) const {
    const uint32_t warp = threadIdx.x / 32;
    if (warp == kCopyWarp && tcgen05::ElectOneThread()) InitBarriers();
    if (warp == kProductWarp) tcgen05::Allocate<T::kColumns>(&shared.tensor_memory);
    __syncwarp();
    tcgen05::FenceBeforeSync();
    SyncCluster();
    tcgen05::FenceAfterSync();

    if (warp == kCopyWarp) {
      if (tcgen05::ElectOneThread()) Copy();
    } else if (warp == kProductWarp) {
      if (tcgen05::ElectOneThread()) Multiply();
    } else if (warp < kFirstDecodeWarp) {
      Store(sink);
    } else {
      Decode();
    }

    __syncwarp();
    tcgen05::FenceBeforeSync();
    __syncthreads();
    tcgen05::FenceAfterSync();
    if (warp == kProductWarp) tcgen05::Deallocate<T::kColumns>(shared.tensor_memory);
  }
};

template <WeightFormat format, int32_t kRows, Operands operands, typename Sink>
__global__ void __launch_bounds__(kDecodedThreads, 1)
    DecodedGemmKernel(const __grid_constant__ DecodedGemm gemm, const __grid_constant__ Sink sink) {
  using Kernel = DecodedKernel<format, kRows, operands, Sink::kPairs>;
  extern __shared__ uint8_t dynamic[];
  __shared__ typename Kernel::Shared shared;
  Kernel{gemm, shared, DecodedStages<typename Kernel::T>(dynamic)}.Run(sink);
}

// The sink of a linear layer: [rows, outputs] in bfloat16 or float32.
struct StoreRows {
  static constexpr bool kPairs = false;
  void* out;
  int64_t num_outputs;
  bool is_float;

  __device__ void operator()(const RowBlock& rows, int32_t row, int32_t output,
                             float value) const {
    const int64_t index = (rows.first_row + row) * num_outputs + output;
    if (is_float) {
      static_cast<float*>(out)[index] = value;
    } else {
      static_cast<uint16_t*>(out)[index] = ToBfloat16(value);
    }
  }
};

}  // namespace dsv4::sm100
