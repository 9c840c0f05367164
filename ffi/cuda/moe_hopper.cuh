// Hopper's asynchronous units: copies into shared memory, warpgroup products.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "tma.cuh"
#include "weight_tiles.cuh"

namespace dsv4 {

// The thread's arrival, once its earlier `CopyChunk`s have landed.
__device__ __forceinline__ void ArriveAfterChunks(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(SharedAddress(barrier))
               : "memory");
}

__device__ __forceinline__ void CopyChunk(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Between ordinary accesses to shared memory and those of the asynchronous units.
__device__ __forceinline__ void FenceAsync() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void SyncThreads(int barrier, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

__device__ __forceinline__ void Signal(int* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ __forceinline__ void WaitFor(const int* counter, int target) {
  int value;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  } while (value < target);
}

// acc += a b of 16 x 16 by 16 x 8.
__device__ __forceinline__ void Multiply(float* acc, const Fragment& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
}

// A descriptor of rows of 128 bytes that follow each other, the 16-byte parts of 8 of them swizzled
// by the row's number; the address is a multiple of 1,024. The low half advances by parts.
constexpr uint32_t kRowsDescriptorHigh = (1u << 30) | (1024 >> 4);

__device__ __forceinline__ uint32_t RowsDescriptorLow(uint32_t shared_address) {
  return (1u << 16) | (shared_address >> 4);
}

__device__ __forceinline__ uint64_t RowsDescriptor(uint32_t low) {
  uint64_t descriptor;
  asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low), "n"(kRowsDescriptorHigh));
  return descriptor;
}

__device__ __forceinline__ uint64_t SwizzledRows(uint32_t shared_address) {
  return RowsDescriptor(RowsDescriptorLow(shared_address));
}

// A register array may not change hands between a product and `FenceProducts`.
__device__ __forceinline__ void FenceProducts() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void CommitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until no product is under way.
template <int kSize>
__device__ __forceinline__ void WaitProducts(float (&acc)[kSize]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

#define DSV4_ACC4(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define DSV4_ACC16(i) DSV4_ACC4(i), DSV4_ACC4(i + 4), DSV4_ACC4(i + 8), DSV4_ACC4(i + 12)

// acc += a b of 64 x 16 by 16 x (2 * size of acc); a is the warp's 16 rows.
__device__ __forceinline__ void MultiplyAsync(float (&acc)[4], const Fragment& a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, %8, 1, 1, 1, 0;"
      : DSV4_ACC4(0)
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(b));
}

__device__ __forceinline__ void MultiplyAsync(float (&acc)[8], const Fragment& a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, %12, 1, 1, 1, 0;"
      : DSV4_ACC4(0), DSV4_ACC4(4)
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(b));
}

__device__ __forceinline__ void MultiplyAsync(float (&acc)[16], const Fragment& a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
      : DSV4_ACC16(0)
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(b));
}

__device__ __forceinline__ void MultiplyAsync(float (&acc)[32], const Fragment& a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
      : DSV4_ACC16(0), DSV4_ACC16(16)
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(b));
}

#undef DSV4_ACC16
#undef DSV4_ACC4

}  // namespace dsv4
