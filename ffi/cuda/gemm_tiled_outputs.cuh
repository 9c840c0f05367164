// The end of a tile: from accumulators to the output.
#pragma once

#include "cluster.cuh"
#include "gemm_tiled_ring.cuh"
#include "moe_hopper.cuh"

namespace dsv4 {

__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Four matrices of 8 x 8 16-bit numbers, transposed; lane l has the address of row l % 8 of matrix
// l / 8.
__device__ __forceinline__ void StoreTransposed(void* row, const uint32_t (&matrices)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
          SharedAddress(row)),
      "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
      : "memory");
}

template <WeightFormat format, int kTokens, bool kCodes>
struct TiledOutputs : TiledRing<format, kTokens, kCodes> {
  using Base = TiledRing<format, kTokens, kCodes>;
  using typename Base::Shared;
  using typename Base::Work;
  using Accumulator = float[kTokens / 2];
  static constexpr int kConsumerBarrier = 1, kGroupBarrier = 2;

  static __device__ __forceinline__ void Finish(const TiledParams& p, const Work& work,
                                                Shared& shared, const Accumulator& acc,
                                                float factor) {
    if (work.ranks > 1) {
      AddUp(p, work, shared, acc, factor);
    } else if (p.gemm.float_output || p.gemm.num_outputs % 8 != 0) {
      WriteEach(p, work, acc, factor);
    } else {
      WriteRows(p, work, shared, acc, factor);
    }
  }

  // A warpgroup's 64 outputs of some tokens at a time, as whole lines of 128 bytes.
  static __device__ __forceinline__ void WriteRows(const TiledParams& p, const Work& work,
                                                   Shared& shared, const Accumulator& acc,
                                                   float factor) {
    constexpr int kLeaving = Base::kLeavingTokens;
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = threadIdx.x % 32;
    auto& leaving = shared.leaving[group];
    // Of the matrices that a lane has the address of.
    const int row = lane / 16 * 8 + lane % 8, part = thread / 32 * 2 + lane / 8 % 2;
    const int n = (work.row_block + group) * kBlockRows + thread % 8 * 8;
    auto* output = static_cast<uint16_t*>(p.gemm.output);
#pragma unroll
    for (int first = 0; first < kTokens; first += kLeaving) {
      SyncThreads(kGroupBarrier + group, 128);  // the tokens before have left
#pragma unroll
      for (int t = 0; t < kLeaving; t += 16) {
        uint32_t matrices[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &acc[(first + t) / 2 + i * 2];
          matrices[i] = PackBf16(pair[0] * factor, pair[1] * factor);
        }
        StoreTransposed(&leaving[t + row][(part ^ row % 8) * 16], matrices);
      }
      SyncThreads(kGroupBarrier + group, 128);
#pragma unroll
      for (int t = 0; t < kLeaving; t += 16) {
        const int token = t + thread / 8;
        const int64_t m = work.first_token + first + token;
        const uint4 outputs =
            *reinterpret_cast<const uint4*>(&leaving[token][(thread % 8 ^ token % 8) * 16]);
        if (m < p.num_rows && n < p.gemm.num_outputs) {
          *reinterpret_cast<uint4*>(output + m * p.gemm.num_outputs + n) = outputs;
        }
      }
    }
  }

  static __device__ __forceinline__ void WriteEach(const TiledParams& p, const Work& work,
                                                   const Accumulator& acc, float factor) {
    const int lane = threadIdx.x % 32;
    const int first_row = work.row_block * kBlockRows + threadIdx.x / 32 * kWarpTileRows + lane / 4;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int64_t m = work.first_token + i / 4 * 8 + lane % 4 * 2 + i % 2;
      const int n = first_row + i / 2 % 2 * 8;
      if (m < p.num_rows && n < p.gemm.num_outputs) {
        Write(p.gemm, m * p.gemm.num_outputs + n, acc[i] * factor);
      }
    }
  }

  static __device__ __forceinline__ void Write(const GemmSegment& gemm, int64_t index, float y) {
    if (gemm.float_output) {
      static_cast<float*>(gemm.output)[index] = y;
    } else {
      static_cast<uint16_t*>(gemm.output)[index] = ToBfloat16(y);
    }
  }

  static __device__ __forceinline__ void WriteFour(const GemmSegment& gemm, int64_t index, int n,
                                                   const float (&y)[4]) {
    if (!gemm.float_output && gemm.num_outputs % 4 == 0) {
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(gemm.output) + index) = {
          PackBf16(y[0], y[1]), PackBf16(y[2], y[3])};
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (n + i < gemm.num_outputs) Write(gemm, index + i, y[i]);
      }
    }
  }

  struct SumsPlace {
    int row, token;
  };

  // Sums over the cluster, of which each block finishes a share of the rows of input.
  static __device__ __forceinline__ void AddUp(const TiledParams& p, const Work& work,
                                               Shared& shared, const Accumulator& acc,
                                               float factor) {
    constexpr int kRows = Base::kRows, kRowStride = Base::kRowStride;
    const int share = kTokens / work.ranks, lane = threadIdx.x % 32;
    // The sums lie where the ring was.
    SyncThreads(kConsumerBarrier, Base::kConsumerThreads);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
      const int row = threadIdx.x / 32 * kWarpTileRows + lane / 4 + i / 2 % 2 * 8;
      shared.sums[token * kRowStride + row] = acc[i];
    }
    SyncCluster();
    const auto place = [&](int item) {
      return SumsPlace{item % (kRows / 4) * 4, work.rank * share + item / (kRows / 4)};
    };
    const int num_items = share * (kRows / 4);
    constexpr int kAtOnce = 4;
    for (int first = threadIdx.x; first < num_items; first += kAtOnce * Base::kConsumerThreads) {
      // All are on their way before the first is added.
      float4 parts[kAtOnce][kMaxRanks];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int item = min(first + i * Base::kConsumerThreads, num_items - 1);
        const auto [row, token] = place(item);
        const auto* part = reinterpret_cast<const float4*>(&shared.sums[token * kRowStride + row]);
#pragma unroll
        for (int rank = 0; rank < kMaxRanks; ++rank) {
          parts[i][rank] = {};
          if (rank < work.ranks) parts[i][rank] = LoadFromRank(part, rank);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int item = first + i * Base::kConsumerThreads;
        const auto [row, token] = place(item);
        const int n = work.row_block * kBlockRows + row;
        const int64_t m = work.first_token + token;
        if (item >= num_items || m >= p.num_rows || n >= p.gemm.num_outputs) continue;
        float4 sum = {};
#pragma unroll
        for (const float4& x : parts[i]) {
          sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
        }
        WriteFour(p.gemm, m * p.gemm.num_outputs + n, n,
                  {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor});
      }
    }
    FenceAsync();  // the ring is filled again by copies
    ArriveAtCluster();
    WaitForCluster();  // others have read the sums
  }
};

}  // namespace dsv4
