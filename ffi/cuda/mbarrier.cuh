// Transaction barriers in shared memory (mbarrier), sm_90 and later.
//
// A barrier's phase ends when its arrivals and the bytes that it expects are all in. WaitBarrier
// returns once the phase of the given parity has ended; of a new barrier the phase "before the
// first", parity 1, has ended, so that a producer's first round never waits.
#pragma once

#include <cstdint>

namespace dsv4 {

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void InitBarrier(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes initialised barriers visible to asynchronous copies and to the cluster.
__device__ __forceinline__ void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void Arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier))
               : "memory");
}

// A warp's arrival, of whose lanes each has read or written something that is over now. Racecheck
// takes along what the arriving thread did, not what __syncwarp has ordered before that: in a
// library built for it all lanes arrive.
#ifdef DSV4_LANES_ARRIVE
constexpr uint32_t kArrivalsOfWarp = 32;
__device__ __forceinline__ void ArriveAsWarp(uint64_t* barrier) { Arrive(barrier); }
#else
constexpr uint32_t kArrivalsOfWarp = 1;
__device__ __forceinline__ void ArriveAsWarp(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) Arrive(barrier);
}
#endif

// One arrival, which also announces `bytes` of asynchronous copies.
__device__ __forceinline__ void ArriveExpectingBytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   SharedAddress(barrier)),
               "r"(bytes)
               : "memory");
}

// The address, in block `rank` of the cluster, of what lies at `pointer` in this block.
__device__ __forceinline__ uint32_t ClusterAddress(const void* pointer, uint32_t rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(SharedAddress(pointer)), "r"(rank));
  return address;
}

// Arrives at another block's barrier and publishes this thread's writes to the cluster.
__device__ __forceinline__ void ArriveInCluster(uint32_t barrier_cluster_address) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                   barrier_cluster_address)
               : "memory");
}

// Arrives at another block's barrier, to say that this thread has read what that block may
// overwrite by asynchronous copies; publishing writes would cost a fence of the whole GPU.
__device__ __forceinline__ void SignalInCluster(uint32_t barrier_cluster_address) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier_cluster_address)
               : "memory");
}

__device__ __forceinline__ void WaitBarrier(uint64_t* barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n}"
        : "=r"(ended)
        : "r"(SharedAddress(barrier)), "r"(parity)
        : "memory");
  } while (!ended);
}

// Also acquires what other blocks of the cluster published by ArriveInCluster.
__device__ __forceinline__ void WaitBarrierOfCluster(uint64_t* barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n}"
        : "=r"(ended)
        : "r"(SharedAddress(barrier)), "r"(parity)
        : "memory");
  } while (!ended);
}

// A position in a ring of `kSlots` barriers and the parity of its current round.
template <uint32_t kSlots>
struct RingPosition {
  uint32_t slot = 0, parity = 0;

  __device__ __forceinline__ void Advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

}  // namespace dsv4
