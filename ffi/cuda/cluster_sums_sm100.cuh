// Blocks of a cluster that take slices of K add up their accumulators in the order of their ranks.
#pragma once

#include <cstdint>

#include "cluster.cuh"
#include "mbarrier.cuh"
#include "tcgen05.cuh"

namespace dsv4::sm100 {

constexpr int32_t kLanes = 128;  // of an accumulator
constexpr uint32_t kStoreThreads = kLanes;

__device__ __forceinline__ uint32_t ClusterRank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32_t ClusterSize() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Of all blocks, four warps each: every block finishes its share of the columns. `accumulator` is
// that of the warp's lanes; `exchange` has room for all its columns; `exchanged` is a barrier of
// all these threads, used once. `finish` gets (column, sum).
template <int32_t kColumns, typename Finish>
__device__ void ExchangeSums(uint64_t* exchanged, float* exchange, uint32_t accumulator,
                             Finish finish) {
  int32_t rank = ClusterRank(), size = ClusterSize(), lane = threadIdx.x % kStoreThreads;
  int32_t share = kColumns / size;
  for (int32_t first = 0; first < kColumns; first += 32) {
    float sums[32];
    tcgen05::LoadColumns(accumulator + first, sums);
#pragma unroll
    for (int32_t i = 0; i < 32; ++i) {
      int32_t column = first + i;
      float* place = exchange + (rank * share + column % share) * kLanes + lane;
      asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(
                       ClusterAddress(place, column / share)),
                   "f"(sums[i])
                   : "memory");
    }
  }
  for (int32_t other = 0; other < size; ++other) {
    ArriveInCluster(ClusterAddress(exchanged, other));
  }
  WaitBarrierOfCluster(exchanged, 0);
  for (int32_t i = 0; i < share; ++i) {
    float sum = 0;
    for (int32_t source = 0; source < size; ++source) {
      sum += exchange[(source * share + i) * kLanes + lane];
    }
    finish(rank * share + i, sum);
  }
}

}  // namespace dsv4::sm100
