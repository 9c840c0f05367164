// Expert products of sorted rows on Hopper: one persistent block per multiprocessor.
//
// Producer warps take items of work in order and stream their weights, 64 outputs x 128 inputs at a
// time, and rows through a ring in shared memory; they run ahead over the ends of items, so that
// memory never rests. Four warpgroups decode weights into registers and multiply. An item waits
// only for earlier ones, so that not all blocks need to be resident.
#pragma once

#include "moe_rows.cuh"

namespace dsv4 {

template <typename Shape>
struct MoeKernel {
  using Tiles = typename Shape::Tiles;
  using Shared = typename Shape::Shared;
  static constexpr int kStreams = Shape::kStreams, kDepth = Shape::kDepth;
  static constexpr int kUnits = Shape::kUnits, kMaxRows = Shape::kMaxRows;
  static constexpr int kCodeBytes = Shape::kCodeBytes, kScaleBytes = Shape::kScaleBytes;
  static constexpr int kChunks = NumChunks(Shape::format);
  static constexpr int kConsumerBarrier = 1, kProducerBarrier = 2;

  const MoeProblem& p;
  Shared& shared;
  RingPosition<Shape::kStages> ring;

  // ---- Weights ----

  // The routing weight of the row that a warp writes among those from `first` on.
  __device__ __forceinline__ float RoutingWeight(const Item& item, int first) const {
    int row = first + threadIdx.x / kWarp % kRowStep;
    return p.plan.weight_of_row[item.first_row + min(row, item.num_rows - 1)];
  }

  // Of the weights of even and odd tiles.
  template <bool kHidden>
  __device__ __forceinline__ void LoadScales(const Item& item, float (&scales)[2]) const {
    constexpr float kUnscale = (Shape::kWarpProducts ? kInputUnscale : 1) * Tiles::kUnscale;
    scales[0] = kUnscale * (kHidden ? p.gate : p.down).global_scale[item.expert];
    scales[1] = kUnscale * (kHidden ? p.up : p.down).global_scale[item.expert];
  }

  template <bool kHidden>
  __device__ __forceinline__ const Weight& WeightOf(int stream) const {
    return !kHidden ? p.down : stream % 2 ? p.up : p.gate;
  }

  // The first block of a stream's 64 outputs.
  template <bool kHidden>
  __device__ __forceinline__ int64_t FirstBlock(const Item& item, int stream) const {
    int outputs = kHidden ? p.f : p.d, inputs = kHidden ? p.d : p.f;
    int row = (item.tile * kStreams + stream) / (kHidden ? 2 : 1);
    return (int64_t{item.expert} * (outputs / kBlockRows) + row) * (inputs / kBlockColumns);
  }

  // ---- Producers ----

  __device__ void Produce() {
    const bool is_first = threadIdx.x == kConsumers;
    // Asked for ahead: the answer takes as long as a stage.
    int next = is_first ? atomicAdd(p.next_item, 1) : 0;
    const ItemCounts counts = CountItems<Shape>(p);
    for (int parity = 0;; parity ^= 1) {
      if (is_first) {
        shared.numbers[parity] = next;
        next = atomicAdd(p.next_item, 1);
      }
      SyncThreads(kProducerBarrier, kProducers);
      Item item = FindItem(p, counts, shared.numbers[parity]);
      switch (item.kind) {
        case Kind::kHidden:
          Stream<true>(item, p.x, p.d);
          break;
        case Kind::kDown:
          // One thread asks, and the others wait for it in Stream: answers to all would keep
          // signals from the counters.
          if (p.out != nullptr && is_first) {
            WaitFor((p.quantize ? p.rounded : p.hidden_done) + item.block,
                    (p.quantize ? 1 : counts.hidden_tiles) * kConsumerWarps);
          }
          Stream<false>(item, p.hidden, p.f);
          break;
        default:
          BeginStage(item, true, 0);
          EndStage();
      }
      if (item.kind == Kind::kEnd) return;
    }
  }

  __device__ __forceinline__ void BeginStage(const Item& item, bool is_first,
                                             uint32_t num_bytes) {
    WaitBarrier(&shared.empty[ring.slot], ring.parity ^ 1);
    if (threadIdx.x == kConsumers) {
      if (is_first) shared.items[ring.slot] = item;
      ArriveExpectingBytes(&shared.full[ring.slot], num_bytes);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void EndStage() {
    ArriveAfterChunks(&shared.full[ring.slot]);
    ring.Advance();
  }

  static __device__ __forceinline__ uint32_t PartOffset(int row, int part) {
    return part / 2 * 128 + ((part ^ row) & 1) * 64;
  }

  // Where 16 bytes of a row's 128 inputs lie, so that readers meet no bank conflicts. For warps:
  // the part i of lanes' share t is that chunk 4 t + i.
  static __device__ __forceinline__ uint32_t ChunkOffset(int row, int chunk) {
    if (Shape::kWarpProducts) {
      return row * kRowBytes + PartOffset(row, chunk % 4) + chunk / 4 * 16;
    }
    return (chunk / 8 * kMaxRows + row) * 128 + ((chunk ^ row) & 7) * 16;
  }

  template <bool kHidden>
  __device__ void Stream(const Item& item, const uint16_t* rows, int width) {
    constexpr int kChunksPerRow = kRowBytes / 16;
    int thread = threadIdx.x - kConsumers, chunk = thread % kChunksPerRow;
    if (thread < item.num_rows) {
      int row = item.first_row + thread;
      if (kHidden) row = p.plan.source_of_row[row];
      shared.row_offsets[thread] = int64_t{row} * width;
    }
    SyncThreads(kProducerBarrier, kProducers);
    rows += 8 * chunk;
    int stream = thread % kStreams;
    const Weight& weight = WeightOf<kHidden>(stream);
    int64_t first = FirstBlock<kHidden>(item, stream);
    const uint8_t* codes = weight.codes + first * kCodeBytes;
    const uint8_t* scales = weight.scales + first * kScaleBytes;

    int num_stages = width / Shape::kInputs;
    for (int stage = 0; stage < num_stages; ++stage) {
      BeginStage(item, stage == 0, kStreams * kDepth * (kCodeBytes + kScaleBytes));
      auto& to = shared.stages[ring.slot];
      if (thread < kStreams) {
        uint64_t* barrier = &shared.full[ring.slot];
        LoadBulk(to.codes + stream * (kDepth * kCodeBytes), codes, kDepth * kCodeBytes, barrier);
        if constexpr (kScaleBytes > 0) {
          LoadBulk(to.scales + stream * (kDepth * kScaleBytes), scales, kDepth * kScaleBytes,
                   barrier);
        }
      }
      codes += kDepth * kCodeBytes;
      scales += kDepth * kScaleBytes;
      uint32_t address = SharedAddress(to.rows);
      for (int row = thread / kChunksPerRow; row < item.num_rows;
           row += kProducers / kChunksPerRow) {
        const uint16_t* from = rows + shared.row_offsets[row];
        uint32_t at = address + ChunkOffset(row, chunk);
#pragma unroll
        for (int depth = 0; depth < kDepth; ++depth) {
          CopyChunk(at + depth * (kMaxRows * kRowBytes), from + depth * kBlockColumns);
        }
      }
      rows += Shape::kInputs;
      EndStage();
    }
  }

  // ---- Consumers ----

  __device__ void Consume() {
    int buffer = 0;
    for (;;) {
      WaitBarrier(&shared.full[ring.slot], ring.parity);
      Item item = shared.items[ring.slot];
      switch (item.kind) {
        case Kind::kHidden:
          Multiply<true>(item, p.d, buffer);
          break;
        case Kind::kDown:
          Multiply<false>(item, p.f, buffer);
          break;
        case Kind::kRound:
          Release();
          RoundHidden<Shape>(p, item);
          break;
        case Kind::kCombine:
          Release();
          Combine<Shape>(p, item);
          break;
        case Kind::kEnd:
          return;
      }
    }
  }

  // The stage may be filled again.
  __device__ __forceinline__ void Release() {
    ArriveAsWarp(&shared.empty[ring.slot]);
    ring.Advance();
  }

  template <bool kHidden>
  __device__ void Multiply(const Item& item, int width, int& buffer) {
    if (Shape::kPairs && item.num_rows <= 2) {
      if constexpr (Shape::kPairs) MultiplyRows<kHidden, 2>(item, width, buffer);
    } else if (item.num_rows <= 8) {
      MultiplyRows<kHidden, 8>(item, width, buffer);
    } else if (item.num_rows <= 16) {
      MultiplyRows<kHidden, 16>(item, width, buffer);
    } else if constexpr (kMaxRows > 16) {
      if (item.num_rows <= 32) {
        MultiplyRows<kHidden, 32>(item, width, buffer);
      } else if constexpr (kMaxRows > 32) {
        MultiplyRows<kHidden, 64>(item, width, buffer);
      }
    }
  }

  template <bool kHidden, int kRows>
  __device__ void MultiplyRows(const Item& item, int width, int& buffer) {
    int first_unit = threadIdx.x / (kWarp * kGroupWarps) * kUnits;
    int stream = first_unit / kDepth, first_depth = first_unit % kDepth;

    // Read ahead where registers allow it, because the results wait for them.
    constexpr bool kAhead = kRows <= 16;
    constexpr int kWritten = kRows < kRowStep ? kRowStep : kRows;
    float scales[2], weights[2] = {};
    if (kAhead) {
      LoadScales<kHidden>(item, scales);
#pragma unroll
      for (int i = 0; kHidden && i < kWritten / kRowStep; ++i) {
        weights[i] = RoutingWeight(item, i * kRowStep);
      }
    }

    const uint8_t* block_scales = nullptr;
    if constexpr (!Shape::kLaneScales) {
      block_scales =
          WeightOf<kHidden>(stream).scales + FirstBlock<kHidden>(item, stream) + first_depth;
    }
    // Units add up on their own where registers allow it: shorter chains of products.
    constexpr int kChains = Shape::kWarpProducts ? kUnits : 1;
    constexpr int kSums = kRows == 2 ? 2 : kRows / 2;
    float acc[kChains][kSums];
#pragma unroll
    for (int i = 0; i < kChains; ++i) {
#pragma unroll
      for (int j = 0; j < kSums; ++j) acc[i][j] = 0;
    }
    int num_stages = width / Shape::kInputs;
    for (int stage = 0; stage < num_stages; ++stage) {
      WaitBarrier(&shared.full[ring.slot], ring.parity);
      const auto& from = shared.stages[ring.slot];
      const uint8_t* rows = from.rows + first_depth * (kMaxRows * kRowBytes);
      const auto load = [&](int i) {
        return LoadUnit(from, first_unit + i, block_scales + stage * kDepth + i);
      };
      if constexpr (kRows == 2) {
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
          PairProducts(acc[i], from, first_unit + i, rows + i * (kMaxRows * kRowBytes));
        }
      } else if constexpr (Shape::kWarpProducts) {
        Unit units[kUnits];
#pragma unroll
        for (int i = 0; i < kUnits; ++i) units[i] = load(i);
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
          WarpProducts<kRows>(acc[i], units[i], rows + i * (kMaxRows * kRowBytes));
        }
      } else {
        FenceAsync();
        // The compiler learns that it is uniform.
        uint32_t low = __shfl_sync(0xffffffffu, RowsDescriptorLow(SharedAddress(rows)), 0);
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
          GroupProducts<kRows>(acc[0], load(i), low + i * (kMaxRows * kRowBytes / 16));
        }
      }
      Release();
    }
#pragma unroll
    for (int i = 1; i < kChains; ++i) {
#pragma unroll
      for (int j = 0; j < kSums; ++j) acc[0][j] += acc[i][j];
    }
    if (!kAhead) LoadScales<kHidden>(item, scales);
    if constexpr (kRows == 2) {
      const float rows[4] = {OfRow(acc[0][0], 0), OfRow(acc[0][0], 1), OfRow(acc[0][1], 0),
                             OfRow(acc[0][1], 1)};
      WriteResults<kHidden, kWritten>(item, rows, scales, weights, buffer);
    } else {
      WriteResults<kHidden, kWritten>(item, acc[0], scales, weights, buffer);
    }
  }

  // A lane's share of a block of weights.
  struct Unit {
    uint4 words[kChunks];
    typename Tiles::RawScale raw;

    __device__ __forceinline__ Fragment Decode(int step) const {
      int chunk = step / Tiles::kStepsPerChunk;
      return Tiles::Decode(words[chunk], step % Tiles::kStepsPerChunk, Tiles::Scales(raw, chunk));
    }
  };

  static __device__ __forceinline__ Unit LoadUnit(const typename Shape::Stage& from, int number,
                                                  const uint8_t* block_scale) {
    int lane = threadIdx.x % kWarp, warp_tile = threadIdx.x / kWarp % kGroupWarps;
    Unit unit;
    if constexpr (Shape::kLaneScales) {
      unit.raw = reinterpret_cast<const typename Tiles::RawScale*>(
          from.scales + number * kScaleBytes)[warp_tile * kWarp + lane];
    } else {
      unit.raw = Tiles::LoadScale(block_scale, warp_tile, lane);
    }
    const uint8_t* tile =
        from.codes + number * kCodeBytes + warp_tile * Shape::kWarpTileBytes + lane * 16;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      unit.words[c] = *reinterpret_cast<const uint4*>(tile + c * kChunkBytes);
    }
    return unit;
  }

  template <int kRows>
  static __device__ __forceinline__ void WarpProducts(float (&acc)[kRows / 2], const Unit& unit,
                                                      const uint8_t* rows) {
    int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kStepsPerBlock / 2; ++i) {
      uint4 x[kRows / 8];
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n) {
        x[n] = *reinterpret_cast<const uint4*>(rows +
                                               ChunkOffset(8 * n + lane / 4, lane % 4 * 4 + i));
      }
      Fragment even = unit.Decode(2 * i), odd = unit.Decode(2 * i + 1);
#pragma unroll
      for (int n = 0; n < kRows / 8; ++n) {
        dsv4::Multiply(acc + 4 * n, even, x[n].x, x[n].y);
        dsv4::Multiply(acc + 4 * n, odd, x[n].z, x[n].w);
      }
    }
  }

  // Products of row r make columns 4 r to 4 r + 3, one for each group of 32 inputs.
  __device__ __forceinline__ void PairProducts(float (&sums)[2], const typename Shape::Stage& from,
                                               int number, const uint8_t* rows) const {
    constexpr int kTileScales = kScaleBytes / kWarpTilesPerBlock;
    int lane = threadIdx.x % kWarp, warp_tile = threadIdx.x / kWarp % kGroupWarps;
    int row = lane / 16, share = lane % 4;
    // Zeros come from other banks.
    bool is_diagonal = lane / 4 % 4 == share;
    int odd = is_diagonal ? row : 1 - row;
    rows = is_diagonal ? rows + row * kRowBytes + share * 16 : shared.zeros;
    const auto* scales = reinterpret_cast<const SumScales<Shape::format>*>(
        from.scales + number * kScaleBytes + warp_tile * kTileScales);
    uint4 chunks[NumChunks(Shape::format)];
    LoadChunks(chunks, from.codes + number * kCodeBytes + warp_tile * Shape::kWarpTileBytes +
                           lane * 16);
    AddScaledProducts(sums, chunks, scales[lane / 4 * 2 + share % 2], [&](int part) {
      return *reinterpret_cast<const uint4*>(rows + PartOffset(odd, part));
    });
  }

  // A row's sum, in lanes 4 g, of what `PairProducts` left in lanes 4 g to 4 g + 3.
  static __device__ __forceinline__ float OfRow(float sum, int row) {
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    float other = __shfl_xor_sync(0xffffffffu, sum, 2);
    return row == 0 ? sum : other;
  }

  template <int kRows>
  static __device__ __forceinline__ void GroupProducts(float (&acc)[kRows / 2], const Unit& unit,
                                                       uint32_t rows) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Fragment a[kStepsPerBlock / 2];
#pragma unroll
      for (int s = 0; s < kStepsPerBlock / 2; ++s) {
        a[s] = unit.Decode(half * (kStepsPerBlock / 2) + s);
      }
      FenceProducts();
#pragma unroll
      for (int s = 0; s < kStepsPerBlock / 2; ++s) {
        MultiplyAsync(acc, a[s], RowsDescriptor(rows + half * (kMaxRows * 8) + s * 2));
      }
      CommitProducts();
    }
    WaitProducts(acc);
  }

  // Adds what warpgroups computed from different inputs and writes 8 rows at a time.
  template <bool kHidden, int kRows>
  __device__ void WriteResults(const Item& item, const float (&acc)[kRows / 2],
                               const float (&scales)[2], const float (&weights)[2], int& buffer) {
    int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (int first = 0; first < kRows; first += kRowStep) {
      float* partials = shared.partials[buffer];
      buffer ^= 1;
      float* mine = partials + warp * Shape::kTilePitch + lane % 4 * (2 * Shape::kPitch) + lane / 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        mine[i % 2 * Shape::kPitch + i / 2 * 8] = acc[first / 2 + i];
      }
      SyncThreads(kConsumerBarrier, kConsumers);
      int row = first + warp % kRowStep;
      if (row < item.num_rows) {
        float weight = weights[first / kRowStep % 2];
        if (kHidden && kRows > 16) weight = RoutingWeight(item, first);
        AddUp<kHidden>(item, partials, row, scales, weight);
      }
    }
    __syncwarp();
    if (p.out != nullptr && lane == 0) {
      Signal(kHidden ? p.hidden_done + item.block : p.columns_done + item.tile);
    }
  }

  // A warp adds up one row's results of pairs of warp tiles: of gate and up, else of neighbours.
  template <bool kHidden>
  __device__ __forceinline__ void AddUp(const Item& item, const float* partials, int row,
                                        const float (&scales)[2], float weight) {
    unsigned thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // Else addresses of all steps would be kept in registers.
    int output = thread % 16, odd = thread / 16 % 2;
    int column = thread / kWarp % kRowStep, upper = thread / (kWarp * kRowStep);
#pragma unroll 2
    for (int i = 0; i < kStreams; ++i) {
      int pair = upper + 2 * i;
      int stream = kHidden ? pair / 4 * 2 + odd : pair / 2;
      int warp_tile = kHidden ? pair % 4 : pair % 2 * 2 + odd;
      float sum = 0;
#pragma unroll
      for (int part = 0; part < Shape::kParts; ++part) {
        int of_warp = (stream * Shape::kParts + part) * kGroupWarps + warp_tile;
        sum += partials[of_warp * Shape::kTilePitch + column * Shape::kPitch + output];
      }
      sum *= odd ? scales[1] : scales[0];
      if (kHidden) {
        float other = __shfl_xor_sync(0xffffffffu, sum, 16);
        int hidden = item.tile * Shape::kHiddenOutputs + pair * kWarpTileRows + output;
        if (!odd) WriteHidden(item.first_row + row, hidden, sum, other, weight);
      } else {
        int out = item.tile * Shape::kDownOutputs + (2 * pair + odd) * kWarpTileRows + output;
        p.y[int64_t{item.first_row + row} * p.d + out] = RoundToBfloat16(sum);
      }
    }
  }

  __device__ __forceinline__ void WriteHidden(int row, int hidden, float gate, float up,
                                              float weight) {
    float value = GatedHidden(gate, up, p.limit) * weight;
    int position = Shape::kWarpProducts ? hidden : OrderedInput(hidden);
    // RoundHidden scales what it rounds.
    if (Shape::kWarpProducts && !p.quantize) value *= 1 / kInputUnscale;
    p.hidden[int64_t{row} * p.f + position] = RoundToBfloat16(value);
  }
};

template <typename Shape>
__global__ void __launch_bounds__(kMoeThreads, 1) Moe(const __grid_constant__ MoeProblem problem) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kStages; ++i) {
      InitBarrier(&shared.full[i], 1 + kProducers);
      InitBarrier(&shared.empty[i], kConsumerWarps * kArrivalsOfWarp);
    }
    FenceBarrierInit();
  }
  if (threadIdx.x < sizeof(shared.zeros)) shared.zeros[threadIdx.x] = 0;
  __syncthreads();
  asm volatile("griddepcontrol.wait;" ::: "memory");
  MoeKernel<Shape> kernel{problem, shared, {}};
  if (threadIdx.x >= kConsumers) {
    kernel.Produce();
  } else {
    kernel.Consume();
  }
}

}  // namespace dsv4
