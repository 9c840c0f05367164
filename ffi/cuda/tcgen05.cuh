// Fifth-generation tensor cores (sm_100 family): tensor memory and block-scaled products.
//
// Tensor memory has 128 lanes x 512 columns of 32 bits; an address is lane << 16 | column.
// Copy, Multiply and Commit are issued by one thread, run asynchronously and in order of issue.
#pragma once

#include <cstdint>

#include "mbarrier.cuh"

namespace dsv4::tcgen05 {

constexpr uint32_t kLaneShift = 16;

// Exactly one thread of a converged warp gets true.
__device__ __forceinline__ bool ElectOneThread() {
  uint32_t elected;
  asm volatile(
      "{\n.reg .pred elected;\nelect.sync _|elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, elected;\n}"
      : "=r"(elected));
  return elected;
}

// Whole warp. Writes the address of `kColumns` (a power of two from 32 on) to shared memory.
template <uint32_t kColumns>
__device__ __forceinline__ void Allocate(uint32_t* address) {
  asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(
                   SharedAddress(address)),
               "n"(kColumns)
               : "memory");
  asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;");
}

template <uint32_t kColumns>
__device__ __forceinline__ void Deallocate(uint32_t address) {
  asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(address),
               "n"(kColumns));
}

// Between this thread's tensor operations and a barrier by which others are told of them.
__device__ __forceinline__ void FenceBeforeSync() {
  asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory");
}

// Between such a barrier and this thread's own tensor operations.
__device__ __forceinline__ void FenceAfterSync() {
  asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");
}

enum class Swizzle : uint64_t { kNone = 0, k128Bytes = 2 };

// Describes rows in shared memory whose K runs along bytes: groups of 8 rows, `stride_bytes` apart.
__device__ __forceinline__ uint64_t MatrixDescriptor(const void* start, uint32_t stride_bytes,
                                                     Swizzle swizzle) {
  constexpr uint64_t kVersion = 1, kLeadingOffset = 1;
  return (SharedAddress(start) >> 4 & 0x3fff) | kLeadingOffset << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | kVersion << 46 |
         static_cast<uint64_t>(swizzle) << 61;
}

// E2M1 times E2M1 with UE4M3 scales, K along the bytes of both operands.
__device__ constexpr uint32_t Nvfp4Instruction(uint32_t rows_a, uint32_t rows_b) {
  constexpr uint32_t kE2m1 = 1;
  return kE2m1 << 7 | kE2m1 << 10 | rows_b / 8 << 17 | rows_a / 16 << 24;
}

// bfloat16 times bfloat16.
__device__ constexpr uint32_t Bfloat16Instruction(uint32_t rows_a, uint32_t rows_b) {
  constexpr uint32_t kFloat32 = 1, kBfloat16 = 1;
  return kFloat32 << 4 | kBfloat16 << 7 | kBfloat16 << 10 | rows_b / 8 << 17 | rows_a / 16 << 24;
}

// E4M3 times E4M3 with UE8M0 scales, of a row's word of scales the one of `step`.
__device__ constexpr uint32_t Mxfp8Instruction(uint32_t rows_a, uint32_t rows_b, uint32_t step) {
  constexpr uint32_t kE4m3 = 0, kUe8m0 = 1;
  return step << 4 | kE4m3 << 7 | kE4m3 << 10 | rows_b / 8 << 17 | kUe8m0 << 23 |
         rows_a / 16 << 24 | step << 29;
}

// One block of swizzled scales, 128 rows x 4 groups = 512 bytes, to 4 columns of tensor memory:
// row r's word at lane r % 32, column r / 32, and so for each quarter of the lanes.
__device__ __forceinline__ void CopyScaleBlock(uint32_t address, const void* block) {
  asm volatile("tcgen05.cp.cta_group::1.32x128b.warpx4 [%0], %1;" ::"r"(address),
               "l"(MatrixDescriptor(block, 128, Swizzle::kNone))
               : "memory");
}

// accumulator (+)= (A * scales of A) (B * scales of B)^T over 64 of K.
__device__ __forceinline__ void MultiplyNvfp4(uint32_t accumulator, uint64_t a, uint64_t b,
                                              uint32_t instruction, uint32_t scales_a,
                                              uint32_t scales_b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %6, 0;\n"
      "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.block16"
      " [%0], %1, %2, %3, [%4], [%5], accumulate;\n}" ::"r"(accumulator),
      "l"(a), "l"(b), "r"(instruction), "r"(scales_a), "r"(scales_b),
      "r"(static_cast<uint32_t>(accumulate))
      : "memory");
}

// accumulator (+)= (A * scales of A) (B * scales of B)^T over 32 of K.
__device__ __forceinline__ void MultiplyMxfp8(uint32_t accumulator, uint64_t a, uint64_t b,
                                              uint32_t instruction, uint32_t scales_a,
                                              uint32_t scales_b, bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %6, 0;\n"
      "tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale.block32"
      " [%0], %1, %2, %3, [%4], [%5], accumulate;\n}" ::"r"(accumulator),
      "l"(a), "l"(b), "r"(instruction), "r"(scales_a), "r"(scales_b),
      "r"(static_cast<uint32_t>(accumulate))
      : "memory");
}

// accumulator (+)= A B^T over 16 of K.
__device__ __forceinline__ void MultiplyBfloat16(uint32_t accumulator, uint64_t a, uint64_t b,
                                                 uint32_t instruction, bool accumulate) {
  asm volatile(
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %4, 0;\n"
      "tcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, accumulate;\n}" ::"r"(accumulator),
      "l"(a), "l"(b), "r"(instruction), "r"(static_cast<uint32_t>(accumulate))
      : "memory");
}

// The barrier gets one arrival when all that this thread issued before has completed.
__device__ __forceinline__ void Commit(uint64_t* barrier) {
  asm volatile(
      "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(
          SharedAddress(barrier))
      : "memory");
}

// Whole warp: 32 columns of the lanes that are the warp's own, 32 * (warp % 4) on.
__device__ __forceinline__ void LoadColumns(uint32_t address, float (&values)[32]) {
  uint32_t r[32];
  asm volatile(
      "tcgen05.ld.sync.aligned.32x32b.x32.b32"
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, [%32];\n"
      "tcgen05.wait::ld.sync.aligned;"
      : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]), "=r"(r[4]), "=r"(r[5]), "=r"(r[6]),
        "=r"(r[7]), "=r"(r[8]), "=r"(r[9]), "=r"(r[10]), "=r"(r[11]), "=r"(r[12]), "=r"(r[13]),
        "=r"(r[14]), "=r"(r[15]), "=r"(r[16]), "=r"(r[17]), "=r"(r[18]), "=r"(r[19]),
        "=r"(r[20]), "=r"(r[21]), "=r"(r[22]), "=r"(r[23]), "=r"(r[24]), "=r"(r[25]),
        "=r"(r[26]), "=r"(r[27]), "=r"(r[28]), "=r"(r[29]), "=r"(r[30]), "=r"(r[31])
      : "r"(address)
      : "memory");
#pragma unroll
  for (int i = 0; i < 32; ++i) values[i] = __uint_as_float(r[i]);
}

}  // namespace dsv4::tcgen05
