// Blocks of a cluster that read and fill each other's shared memory (sm_90).
#pragma once

#include "mbarrier.cuh"

namespace dsv4 {

// From the same offset in the shared memory of block `rank`.
__device__ __forceinline__ float4 LoadFromRank(const float4* source, uint32_t rank) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(ClusterAddress(source, rank))
               : "memory");
  return x;
}

// To the same offset in the shared memory of the blocks in `mask`, and the bytes to their barriers.
__device__ __forceinline__ void LoadBulkToCluster(void* destination, const void* source,
                                                  uint32_t bytes, uint64_t* barrier,
                                                  uint16_t mask) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1], %2, [%3], %4;" ::"r"(SharedAddress(destination)),
      "l"(source), "r"(bytes), "r"(SharedAddress(barrier)), "h"(mask)
      : "memory");
}

// All threads of all blocks, and what they wrote.
__device__ __forceinline__ void SyncCluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// The same in two steps, and without what they wrote.
__device__ __forceinline__ void ArriveAtCluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void WaitForCluster() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

}  // namespace dsv4
