// The softmax of 64 heads over tiles of entries, by two warpgroups: each computes the logits of
// half of a tile's entries, and accumulates its half of the channels over all of them.
#pragma once

#include "attention_products.cuh"
#include "attention_softmax.cuh"
#include "attention_tiles.cuh"

namespace dsv4 {

constexpr int kConsumers = 2, kWarpgroup = 128;
constexpr int kConsumerThreads = kConsumers * kWarpgroup;
constexpr int kChannels = kWidth / kConsumers;      // of a consumer
constexpr int kOwnEntries = kTileRows / kConsumers;  // of a tile
constexpr int kConsumerBarrier = 1, kOwnBarrier = 2;  // of both, and the first of each

// What the consumers tell each other: the weights as the rows of a tile of 64 entries, and of each
// head the consumers' highest logits or, in the end, their sums.
struct Exchange {
  uint8_t weights[kTileRows * 128];
  float of_heads[kConsumers][kTileRows];
};

// A thread's part of 64 heads: rows `lane / 4` and 8 more of its warp's 16.
struct Consumer {
  float o[kChannels / 2];
  float peak[2], sum[2];  // in powers of two

  __device__ __forceinline__ void Reset() {
#pragma unroll
    for (int i = 0; i < kChannels / 2; ++i) o[i] = 0.0f;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      peak[row] = -INFINITY;
      sum[row] = 0.0f;
    }
  }

  __device__ __forceinline__ void Attend(const uint8_t* queries, const uint8_t* entries,
                                         const float* bias, float scale, Exchange& exchange) {
    float s[kOwnEntries / 2];
    const uint64_t a = SwizzledRows(OwnAddress(queries));
    const uint64_t b = SwizzledRows(OwnAddress(entries + Number() * kOwnEntries * 128));
    FenceProducts();
#pragma unroll
    for (int step = 0; step < kWidth / 16; ++step) {
      const uint64_t offset = (step / 4 * kPanelBytes + step % 4 * 32) >> 4;
      MultiplyRowsAsync(s, a + offset, b + offset, step != 0);
    }
    CommitProducts();
    WaitProducts(s);

    bias += Number() * kOwnEntries + 2 * (threadIdx.x % 4);
    float highest[2] = {peak[0], peak[1]};
#pragma unroll
    for (int i = 0; i < kOwnEntries / 8; ++i) {
      const float2 mask = *reinterpret_cast<const float2*>(bias + 8 * i);
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        float* x = s + 4 * i + 2 * which;
        x[0] = x[0] * scale + mask.x;
        x[1] = x[1] * scale + mask.y;
        highest[which] = fmaxf(highest[which], fmaxf(x[0], x[1]));
      }
    }
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      highest[which] = fmaxf(highest[which], __shfl_xor_sync(kAllLanes, highest[which], 1));
      highest[which] = fmaxf(highest[which], __shfl_xor_sync(kAllLanes, highest[which], 2));
    }
    Tell(exchange, highest);
    float factor[2];
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      highest[which] = fmaxf(highest[which], exchange.of_heads[1 - Number()][Row(which)]);
      factor[which] = Exp2(peak[which] - Base(highest[which]));
      peak[which] = highest[which];
      sum[which] *= factor[which];
    }
    uint8_t* weights = exchange.weights + threadIdx.x % 4 * 4;
#pragma unroll
    for (int i = 0; i < kOwnEntries / 8; ++i) {
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const float first = Exp2(s[4 * i + 2 * which] - Base(peak[which]));
        const float second = Exp2(s[4 * i + 2 * which + 1] - Base(peak[which]));
        sum[which] += first + second;
        const int offset = TileOffset(Row(which), 0, Number() * (kOwnEntries / 8) + i);
        *reinterpret_cast<uint32_t*>(weights + offset) = PackBf16x2(first, second);
      }
    }
    if (__any_sync(kAllLanes, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
      for (int i = 0; i < kChannels / 2; ++i) o[i] *= factor[i / 2 % 2];
    }
    FenceAsync();
    SyncThreads(kConsumerBarrier, kConsumerThreads);
    const uint64_t rows = SwizzledRows(OwnAddress(exchange.weights));
    const uint64_t values = SwizzledColumns<kPanelBytes>(
        OwnAddress(entries + Number() * (kPanels / kConsumers) * kPanelBytes));
    FenceProducts();
#pragma unroll
    for (int step = 0; step < kTileRows / 16; ++step) {
      MultiplyColumnsAsync(o, rows + (step * 32 >> 4), values + (step * 16 * 128 >> 4));
    }
    CommitProducts();
    WaitProducts(o);
  }

  // To the other consumer, which has read what it was told before.
  static __device__ __forceinline__ void Tell(Exchange& exchange, const float (&of_heads)[2]) {
    if (threadIdx.x % 4 == 0) {
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        exchange.of_heads[Number()][Row(which)] = of_heads[which];
      }
    }
    SyncThreads(kConsumerBarrier, kConsumerThreads);
  }

  __device__ __forceinline__ void SumOverEntries(Exchange& exchange) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      sum[which] += __shfl_xor_sync(kAllLanes, sum[which], 1);
      sum[which] += __shfl_xor_sync(kAllLanes, sum[which], 2);
    }
    Tell(exchange, sum);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int head = Row(which);
      sum[which] = exchange.of_heads[0][head] + exchange.of_heads[1][head];
    }
  }

  // Calls f(i, which, two channels of row `Row(which)` from `8 i + Column()` on).
  template <typename Function>
  __device__ __forceinline__ void ForEachPair(Function f) const {
#pragma unroll
    for (int i = 0; i < kChannels / 8; ++i) {
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        f(i, which, float2{o[4 * i + 2 * which], o[4 * i + 2 * which + 1]});
      }
    }
  }

  static __device__ __forceinline__ int Number() { return threadIdx.x / kWarpgroup; }

  static __device__ __forceinline__ int Column() {
    return Number() * kChannels + 2 * (threadIdx.x % 4);
  }

  static __device__ __forceinline__ int Row(int which) {
    return threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4 + 8 * which;
  }

  // Calls f(i, two channels of both rows from `8 i + Column()` on).
  template <typename Function>
  __device__ __forceinline__ void ForEachPiece(Function f) const {
#pragma unroll
    for (int i = 0; i < kChannels / 8; ++i) {
      f(i, float4{o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]});
    }
  }

  // Calls f(head, {peak, sum}) once for each head.
  template <typename Function>
  __device__ __forceinline__ void ForEachHead(Function f) const {
    if (threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int which = 0; which < 2; ++which) f(Row(which), float2{peak[which], sum[which]});
  }

  // Adds what another consumer of the same channels has of other entries.
  __device__ __forceinline__ void Add(const float4* pieces, const float2* stats) {
    float own[2], others[2];
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const float2 other = stats[Row(which)];
      const float joint = fmaxf(peak[which], other.x);
      own[which] = Exp2(peak[which] - Base(joint));
      others[which] = Exp2(other.x - Base(joint));
      peak[which] = joint;
      sum[which] = __fmul_rn(sum[which], own[which]) + __fmul_rn(other.y, others[which]);
    }
#pragma unroll
    for (int i = 0; i < kChannels / 8; ++i) {
      const float4 x = pieces[i * kWarpgroup + threadIdx.x % kWarpgroup];
      o[4 * i] = o[4 * i] * own[0] + x.x * others[0];
      o[4 * i + 1] = o[4 * i + 1] * own[0] + x.y * others[0];
      o[4 * i + 2] = o[4 * i + 2] * own[1] + x.z * others[1];
      o[4 * i + 3] = o[4 * i + 3] * own[1] + x.w * others[1];
    }
  }

  // What a head's outputs are multiplied by; `sink` is of the first head.
  __device__ __forceinline__ float2 Normalisers(const float* sink, int num_heads) const {
    float normaliser[2];
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int head = Row(which);
      normaliser[which] =
          head < num_heads ? Normaliser(sum[which], peak[which], __ldg(sink + head)) : 0.0f;
    }
    return {normaliser[0], normaliser[1]};
  }

  // The same for the means over the entries alone.
  __device__ __forceinline__ float2 Means() const {
    return {sum[0] == 0.0f ? 0.0f : 1.0f / sum[0], sum[1] == 0.0f ? 0.0f : 1.0f / sum[1]};
  }

  // Writes the outputs of the consumer's channels by way of `tile`, in which nobody else is busy;
  // `out` is of the first head. Without `rotation` they are not rotated.
  __device__ __forceinline__ void StoreOutput(uint16_t* out, uint8_t* tile, float2 normalisers,
                                              int num_heads, const float2* rotation) const {
    constexpr int kOwnPanels = kPanels / kConsumers;
    StoreTile(tile, normalisers, rotation);
    SyncThreads(kOwnBarrier + Number(), kWarpgroup);
    StoreRows<kOwnPanels>(out, tile, num_heads, Number() * kOwnPanels, threadIdx.x % kWarpgroup,
                          kWarpgroup);
  }

  // Leaves the outputs of the consumer's channels in a tile.
  __device__ __forceinline__ void StoreTile(uint8_t* tile, float2 normalisers,
                                            const float2* rotation) const {
    constexpr int kOwnPanels = kPanels / kConsumers, kRotatedFrom = (kChannels - kRotary) / 8;
    const bool rotated = rotation != nullptr && Number() == kConsumers - 1;
    const uint32_t to = SharedAddress(tile + TileOffset(Row(0), Number() * kOwnPanels, 0)) +
                        threadIdx.x % 4 * 4;
    ForEachPair([&](int i, int which, float2 pair) {
      const float normaliser = which ? normalisers.y : normalisers.x;
      pair = {pair.x * normaliser, pair.y * normaliser};
      if (i >= kRotatedFrom && rotated) {
        pair = RotateBack(pair, rotation[(i - kRotatedFrom) * 4 + threadIdx.x % 4]);
      }
      // Volatile keeps the compiler from preparing all the addresses at once.
      const uint32_t offset = i / 8 * kPanelBytes + which * 1024;
      asm volatile("st.shared.b32 [%0], %1;" ::"r"((to ^ (i % 8 * 16)) + offset),
                   "r"(PackBf16x2(pair.x, pair.y))
                   : "memory");
    });
  }
};

}  // namespace dsv4
