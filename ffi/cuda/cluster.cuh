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

// To another block's shared memory, and the bytes to its barrier.
__device__ __forceinline__ void StoreInCluster(uint32_t cluster_address, uint32_t cluster_barrier,
                                               float x, float y, float z, float w) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
      ::"r"(cluster_address),
      "f"(x), "f"(y), "f"(z), "f"(w), "r"(cluster_barrier)
      : "memory");
}

__device__ __forceinline__ void StoreInCluster(uint32_t cluster_address, uint32_t cluster_barrier,
                                               float x, float y) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          cluster_address),
      "f"(x), "f"(y), "r"(cluster_barrier)
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
