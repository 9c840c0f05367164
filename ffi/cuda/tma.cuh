// Asynchronous bulk copies from global to shared memory (TMA), sm_90 and later. Every copy
// completes as bytes on a transaction barrier.
#pragma once

#include <cstdint>

#include "mbarrier.cuh"

namespace dsv4 {

// A CUtensorMap, without cuda.h. Kernels take it as a __grid_constant__ parameter.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

__device__ __forceinline__ void PrefetchTensorMap(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the map's box at (column, row), in elements. What lies outside the tensor arrives as
// zeros; the barrier gets the whole box's bytes.
__device__ __forceinline__ void LoadBox(void* destination, const TensorMap& map, int32_t column,
                                        int32_t row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(SharedAddress(destination)),
      "l"(&map), "r"(column), "r"(row), "r"(SharedAddress(barrier))
      : "memory");
}

// `bytes`, the source's and the destination's address are multiples of 16.
__device__ __forceinline__ void LoadBulk(void* destination, const void* source, uint32_t bytes,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1], %2, [%3];" ::"r"(SharedAddress(destination)),
      "l"(source), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
}

}  // namespace dsv4
