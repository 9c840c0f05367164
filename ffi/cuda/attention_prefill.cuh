// Sparse attention of many queries (sm_90a): 64 heads of a query over rows of a workspace.
//
// One warpgroup copies 64 queries and tiles of 64 entries into shared memory. Two others consume
// pairs of tiles: each computes the weights of one tile and accumulates its half of the channels
// over both, so that the softmax of one overlaps with the products of the other. Blocks are
// persistent: the copies run ahead into their next item.
#pragma once

#include "attention_consumer.cuh"
#include "attention_prefill_products.cuh"
#include "attention_workspace.cuh"

namespace dsv4 {

constexpr int kPrefillThreads = kConsumerThreads + kWarpgroup;
constexpr int kFirstReady = 2, kSecondReady = 3;  // barriers: the weights of a pair's tiles
// A peak follows the logits only once they are so many powers of two above it: weights stay below
// 2^8, and what was summed before is hardly ever rescaled.
constexpr float kSlack = 8.0f;

struct PrefillItem {
  Query query;
  int num_pairs, num_heads;
  int64_t first_row;  // of all heads of all queries

  __device__ PrefillItem(const PrefillProblem& p, int index)
      : query(QueryOf(p.a, index / p.tiles)) {
    const int tile = index % p.tiles;
    num_pairs = (query.num_slots + 2 * kTileRows - 1) / (2 * kTileRows);
    num_heads = min(p.a.heads - tile * kTileRows, kTileRows);
    first_row = int64_t{query.row} * p.a.heads + tile * kTileRows;
  }
};

struct PrefillShared {
  uint8_t queries[kTileBytes];
  uint8_t entries[2][kTileBytes];
  uint8_t weights[2][kTileRows * 128];
  float peaks[2][kTileRows];
  float sums[2][kConsumers][kTileRows];  // of items in turn
  alignas(8) uint16_t seen[2][kTileRows / 16];  // a bit for each entry of a tile
  uint64_t queries_full, queries_empty;
  uint64_t full[2][kConsumers], empty[2][kConsumers];  // halves of the channels of tiles
};

__device__ __forceinline__ void CopyChunkOrZeros(uint32_t to, const void* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}

// A warp copies 16 rows, four in a round: eight lanes the 128 bytes of a panel in a row.
struct RowCopies {
  static constexpr int kRounds = 4;

  int lane, first_row;
  uint32_t to[kRounds];

  __device__ RowCopies() : lane(threadIdx.x % 32), first_row(threadIdx.x % kWarpgroup / 32 * 16) {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) to[i] = TileOffset(first_row + Row(i), 0, lane % 8);
  }

  __device__ __forceinline__ int Row(int round) const { return 4 * round + lane / 8; }

  // Of panels from `first_panel` on; `row` is of 512 numbers, null for zeros.
  template <int kCount>
  __device__ __forceinline__ void Copy(uint8_t* tile, int first_panel, int round,
                                       const uint16_t* row, const uint16_t* any_row) const {
    const auto* from = reinterpret_cast<const uint8_t*>(row == nullptr ? any_row : row) +
                       first_panel * 128 + lane % 8 * 16;
    const uint32_t address = SharedAddress(tile) + first_panel * kPanelBytes + to[round];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      CopyChunkOrZeros(address + i * kPanelBytes, from + i * 128, row != nullptr);
    }
  }
};

__device__ void FetchForPrefill(const PrefillProblem& p, PrefillShared& shared) {
  constexpr int kHalf = kPanels / 2;
  const RowCopies copies;
  const auto* q = static_cast<const uint16_t*>(p.a.q);
  uint32_t queries_parity = 1;
  RingPosition<2> stage;
#pragma unroll 1
  for (int index = blockIdx.x; index < p.num_items; index += gridDim.x) {
    const PrefillItem item(p, index);
    const int own_slot = copies.first_row + copies.lane % 16;
    int64_t next = WorkspaceRow(p.a, item.query, own_slot);
    WaitBarrier(&shared.queries_empty, queries_parity);
    queries_parity ^= 1;
#pragma unroll
    for (int i = 0; i < copies.kRounds; ++i) {
      const int head = copies.first_row + copies.Row(i);
      const uint16_t* row =
          head < item.num_heads ? q + (item.first_row + head) * kWidth : nullptr;
      copies.Copy<kPanels>(shared.queries, 0, i, row, q);
    }
    ArriveAfterChunks(&shared.queries_full);
    asm volatile("griddepcontrol.wait;" ::: "memory");  // for the workspace
#pragma unroll 1
    for (int tile = 0; tile < 2 * item.num_pairs; ++tile) {
      const int64_t found = next;
      next = WorkspaceRow(p.a, item.query, (tile + 1) * kTileRows + own_slot);
      const unsigned seen = __ballot_sync(kAllLanes, found >= 0);
      const uint16_t* rows[copies.kRounds];
#pragma unroll
      for (int i = 0; i < copies.kRounds; ++i) {
        const int64_t row = __shfl_sync(kAllLanes, found, copies.Row(i));
        rows[i] = row < 0 ? nullptr : p.workspace + row * kWidth;
      }
      uint8_t* to = shared.entries[stage.slot];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint64_t* full = &shared.full[stage.slot][half];
        WaitBarrier(&shared.empty[stage.slot][half], stage.parity ^ 1);
        if (half == 0) {
          if (copies.lane == 0) shared.seen[stage.slot][copies.first_row / 16] = seen;
          Arrive(full);
        }
#pragma unroll
        for (int i = 0; i < copies.kRounds; ++i) {
          copies.Copy<kHalf>(to, half * kHalf, i, rows[i], p.workspace);
        }
        ArriveAfterChunks(full);
      }
      stage.Advance();
    }
  }
}

// Racecheck does not follow bar.arrive either: in a library built for it the warp waits, too, which
// the order of the two barriers allows.
__device__ __forceinline__ void ArriveAt(int barrier, int num_threads) {
#ifdef DSV4_LANES_ARRIVE
  SyncThreads(barrier, num_threads);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
#endif
}

// The warp's 16 rows of 16 channels, into a panel.
__device__ __forceinline__ void StoreFragment(uint8_t* panel, int step, const Fragment& x) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % kWarpgroup / 32 * 16 + lane % 16;
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   SharedAddress(panel + TileOffset(row, 0, 2 * step + lane / 16))),
               "r"(x.x[0]), "r"(x.x[1]), "r"(x.x[2]), "r"(x.x[3])
               : "memory");
}

// A thread's part of 64 heads: rows `lane / 4` and 8 more of its warp's 16, and of the channels the
// half that belongs to its warpgroup, `kNumber`. It computes the weights of the pair's tile of the
// same number.
template <int kNumber>
struct PrefillConsumer {
  static constexpr int kSteps = kTileRows / 16;
  static constexpr int kOwnPanels = kPanels / kConsumers;

  PrefillShared& shared;
  const float scale;  // of logits as powers of two
  float o[kChannels / 2];
  float peak[2], sum[2];
  float s[kTileRows / 2];
  Fragment weights[kSteps];

  static __device__ __forceinline__ int Row(int which) { return Consumer::Row(which); }

  __device__ __forceinline__ void Reset() {
#pragma unroll
    for (int i = 0; i < kChannels / 2; ++i) o[i] = 0.0f;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      peak[row] = -INFINITY;
      sum[row] = 0.0f;
    }
  }

  // Of the own tile.
  __device__ __forceinline__ void ComputeLogits(uint32_t parity) {
    constexpr int kStepsOfHalf = kWidth / 16 / 2;
    const uint64_t a = SwizzledRows(OwnAddress(shared.queries));
    const uint64_t b = SwizzledRows(OwnAddress(shared.entries[kNumber]));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      WaitBarrier(&shared.full[kNumber][half], parity);
      FenceAsync();
      FenceProducts();
#pragma unroll
      for (int i = 0; i < kStepsOfHalf; ++i) {
        const int step = half * kStepsOfHalf + i;
        const uint64_t offset = (step / 4 * kPanelBytes + step % 4 * 32) >> 4;
        MultiplyRowsAsync(s, a + offset, b + offset, step != 0);
      }
    }
    CommitProducts();
    WaitProducts(s);
  }

  // From logits to weights; stores them, and the peaks that they are relative to. Returns what to
  // multiply with everything that is relative to the peaks of before.
  __device__ __forceinline__ float2 ComputeWeights() {
    const uint2 seen = *reinterpret_cast<const uint2*>(shared.seen[kNumber]);
    if ((seen.x & seen.y) != ~0u) {
#pragma unroll
      for (int i = 0; i < kTileRows / 8; ++i) {
        const uint32_t bits = (i < 4 ? seen.x : seen.y) >> (i % 4 * 8 + threadIdx.x % 4 * 2);
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          if (!(bits & 1)) s[4 * i + 2 * which] = -INFINITY;
          if (!(bits & 2)) s[4 * i + 2 * which + 1] = -INFINITY;
        }
      }
    }
    float factor[2], base[2];
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      float highest = -INFINITY;
#pragma unroll
      for (int i = 0; i < kTileRows / 8; ++i) {
        highest = fmaxf(highest, fmaxf(s[4 * i + 2 * which], s[4 * i + 2 * which + 1]));
      }
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2)) * scale;
      factor[which] = MovePeak(which, highest > peak[which] + kSlack ? highest : peak[which]);
      base[which] = Base(peak[which]);
      if (threadIdx.x % 4 == 0) shared.peaks[kNumber][Row(which)] = peak[which];
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int which = i % 2;
        const float first = Exp2(fmaf(s[8 * step + 2 * i], scale, -base[which]));
        const float second = Exp2(fmaf(s[8 * step + 2 * i + 1], scale, -base[which]));
        sum[which] += first + second;
        weights[step].x[i] = PackBf16x2(first, second);
      }
      StoreFragment(shared.weights[kNumber], step, weights[step]);
    }
    FenceAsync();
    ArriveAt(kNumber == 0 ? kFirstReady : kSecondReady, kConsumerThreads);
    return {factor[0], factor[1]};
  }

  // Waits for the other warpgroup's weights, and follows its peaks.
  __device__ __forceinline__ float2 FollowOther() {
    SyncThreads(kNumber == 0 ? kSecondReady : kFirstReady, kConsumerThreads);
    const float* peaks = shared.peaks[1 - kNumber];
    return {MovePeak(0, peaks[Row(0)]), MovePeak(1, peaks[Row(1)])};
  }

  // Before the first peak there is nothing to scale.
  __device__ __forceinline__ float MovePeak(int which, float to) {
    const float factor = peak[which] == -INFINITY ? 1.0f : Exp2(peak[which] - to);
    peak[which] = to;
    sum[which] *= factor;
    return factor;
  }

  __device__ __forceinline__ void ScaleOutput(float2 factor) {
    if (__any_sync(kAllLanes, factor.x != 1.0f || factor.y != 1.0f)) {
#pragma unroll
      for (int i = 0; i < kChannels / 2; ++i) o[i] *= i / 2 % 2 ? factor.y : factor.x;
    }
  }

  // The own channels of a tile's entries.
  __device__ __forceinline__ uint64_t Values(int tile) const {
    return SwizzledColumns<kPanelBytes>(
        OwnAddress(shared.entries[tile] + kNumber * kOwnPanels * kPanelBytes));
  }

  __device__ __forceinline__ void AddOwnAsync() {
    const uint64_t values = Values(kNumber);
    FenceProducts();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      MultiplyColumnsAsync(o, weights[step], values + (step * 16 * 128 >> 4));
    }
    CommitProducts();
  }

  __device__ __forceinline__ void AddOtherAsync() {
    const uint64_t rows = SwizzledRows(OwnAddress(shared.weights[1 - kNumber]));
    const uint64_t values = Values(1 - kNumber);
    FenceProducts();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      MultiplyColumnsAsync(o, rows + (step * 32 >> 4), values + (step * 16 * 128 >> 4));
    }
    CommitProducts();
  }

  // Of the products with a tile.
  __device__ __forceinline__ void Release(int tile) {
    WaitProducts(o);
    ArriveAsWarp(&shared.empty[tile][kNumber]);
  }

  __device__ __forceinline__ void AttendPair(uint32_t parity, bool last) {
    ComputeLogits(parity);
    if (last) ArriveAsWarp(&shared.queries_empty);
    if (kNumber == 0) {
      ScaleOutput(ComputeWeights());
      AddOwnAsync();
      Release(0);
      ScaleOutput(FollowOther());
      AddOtherAsync();
      Release(1);
    } else {
      ScaleOutput(FollowOther());
      AddOtherAsync();
      const float2 factor = ComputeWeights();
      Release(0);
      ScaleOutput(factor);
      AddOwnAsync();
      Release(1);
    }
  }

  __device__ __forceinline__ void SumOverEntries(float (&sums)[kConsumers][kTileRows]) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      sum[which] += __shfl_xor_sync(kAllLanes, sum[which], 1);
      sum[which] += __shfl_xor_sync(kAllLanes, sum[which], 2);
      if (threadIdx.x % 4 == 0) sums[kNumber][Row(which)] = sum[which];
    }
    SyncThreads(kConsumerBarrier, kConsumerThreads);
#pragma unroll
    for (int which = 0; which < 2; ++which) sum[which] += sums[1 - kNumber][Row(which)];
  }

  // Writes the own channels by way of the own weights' place, a panel at a time.
  __device__ __forceinline__ void StoreOutput(const PrefillItem& item, uint16_t* out,
                                              const float* sink, const float* frequencies) const {
    const int lane = threadIdx.x % 32, first_row = threadIdx.x % kWarpgroup / 32 * 16;
    uint8_t* staged = shared.weights[kNumber];
    const float2 own_rotation = kNumber == kConsumers - 1
                                    ? Rotation(item.query.position, __ldg(frequencies + lane))
                                    : float2{};
    float normaliser[2];
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int head = Row(which);
      normaliser[which] =
          head < item.num_heads ? Normaliser(sum[which], peak[which], __ldg(sink + head)) : 0.0f;
    }
#pragma unroll
    for (int panel = 0; panel < kOwnPanels; ++panel) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        Fragment x;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* from = o + (panel * 4 + step) * 8 + 2 * i;
          float2 pair = {from[0] * normaliser[i % 2], from[1] * normaliser[i % 2]};
          if (kNumber == kConsumers - 1 && panel == kOwnPanels - 1) {
            const int source = (2 * step + i / 2) * 4 + lane % 4;
            pair = RotateBack(pair, {__shfl_sync(kAllLanes, own_rotation.x, source),
                                     __shfl_sync(kAllLanes, own_rotation.y, source)});
          }
          x.x[i] = PackBf16x2(pair.x, pair.y);
        }
        StoreFragment(staged, step, x);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int head = first_row + 4 * i + lane / 8, part = lane % 8;
        if (head < item.num_heads) {
          const int channel = (kNumber * kOwnPanels + panel) * 64 + part * 8;
          *reinterpret_cast<uint4*>(out + head * kWidth + channel) =
              *reinterpret_cast<const uint4*>(staged + TileOffset(head, 0, part));
        }
      }
      __syncwarp();
    }
  }
};

template <int kNumber>
__device__ void ConsumeForPrefill(const PrefillProblem& p, PrefillShared& shared) {
  PrefillConsumer<kNumber> consumer = {shared, p.a.scale * kLog2e};
  uint32_t queries_parity = 0, parity = 0;
#pragma unroll 1
  for (int index = blockIdx.x; index < p.num_items; index += gridDim.x) {
    const PrefillItem item(p, index);
    consumer.Reset();
    WaitBarrier(&shared.queries_full, queries_parity);
    if (item.num_pairs == 0) ArriveAsWarp(&shared.queries_empty);
#pragma unroll 1
    for (int pair = 0; pair < item.num_pairs; ++pair) {
      consumer.AttendPair(parity, pair + 1 == item.num_pairs);
      parity ^= 1;
    }
    consumer.SumOverEntries(shared.sums[queries_parity]);
    consumer.StoreOutput(item, p.o + item.first_row * kWidth,
                         p.a.sink + index % p.tiles * kTileRows, p.a.frequencies);
    queries_parity ^= 1;
  }
}

__global__ void __launch_bounds__(kPrefillThreads, 1)
    AttendPrefill(const __grid_constant__ PrefillProblem p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<PrefillShared*>(memory);
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = kConsumerThreads / 32;
    InitBarrier(&shared.queries_full, kWarpgroup);
    InitBarrier(&shared.queries_empty, kConsumerWarps * kArrivalsOfWarp);
    for (int tile = 0; tile < 2; ++tile) {
      for (int half = 0; half < 2; ++half) {
        // The left half also brings word of which entries exist.
        InitBarrier(&shared.full[tile][half], (half == 0 ? 2 : 1) * kWarpgroup);
        InitBarrier(&shared.empty[tile][half], kConsumerWarps / kConsumers * kArrivalsOfWarp);
      }
    }
    FenceBarrierInit();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / kWarpgroup;
  if (warpgroup == kConsumers) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    FetchForPrefill(p, shared);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    if (warpgroup == 0) {
      ConsumeForPrefill<0>(p, shared);
    } else {
      ConsumeForPrefill<1>(p, shared);
    }
  }
}

}  // namespace dsv4
