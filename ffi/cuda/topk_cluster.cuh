// What the blocks of a cluster that select from one row tell each other, without fences: numbers
// and copies that count as bytes on the receiver's transaction barrier.
#pragma once

#include "cluster.cuh"

namespace dsv4 {

// A number to `destination` in the shared memory of block `rank`.
__device__ __forceinline__ void SendNumber(uint64_t* destination, uint64_t number,
                                           uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(
          ClusterAddress(destination, rank)),
      "l"(number), "r"(ClusterAddress(barrier, rank))
      : "memory");
}

// `bytes` of this block's shared memory, a multiple of 16, to block `rank`. Threads that wrote them
// have called FenceCopies, and all have met since.
__device__ __forceinline__ void SendCopy(void* destination, const void* source, uint32_t bytes,
                                         uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"
      " [%0], [%1], %2, [%3];" ::"r"(ClusterAddress(destination, rank)),
      "r"(SharedAddress(source)), "r"(bytes), "r"(ClusterAddress(barrier, rank))
      : "memory");
}

__device__ __forceinline__ void FenceCopies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace dsv4
