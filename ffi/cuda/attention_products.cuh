// Products of a warpgroup (wgmma, sm_90a) for attention: 64 queries by 32 entries, and the weights
// of 64 entries by 256 channels of them, which lie with their channels along the rows.
#pragma once

#include "moe_hopper.cuh"

namespace dsv4 {

__device__ __forceinline__ uint32_t OwnAddress(const void* pointer) {
  return SharedAddress(pointer) & 0x3ffffu;
}

#define DSV4_F8(x, i)                                                                             \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), \
      "+f"(x[i + 6]), "+f"(x[i + 7])
#define DSV4_F32(x, i) DSV4_F8(x, i), DSV4_F8(x, i + 8), DSV4_F8(x, i + 16), DSV4_F8(x, i + 24)

// acc = a b, or += where `accumulate`: 64 x 16 by the transpose of 32 x 16.
__device__ __forceinline__ void MultiplyRowsAsync(float (&acc)[16], uint64_t a, uint64_t b,
                                                  bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, 0, 0;\n}"
      : DSV4_F8(acc, 0), DSV4_F8(acc, 8)
      : "l"(a), "l"(b), "r"(int{accumulate}));
}

// acc += a b: 64 x 16 by 16 x 256.
__device__ __forceinline__ void MultiplyColumnsAsync(float (&acc)[128], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "
      "%127}, %128, %129, 1, 1, 1, 0, 1;"
      : DSV4_F32(acc, 0), DSV4_F32(acc, 32), DSV4_F32(acc, 64), DSV4_F32(acc, 96)
      : "l"(a), "l"(b));
}

#undef DSV4_F32
#undef DSV4_F8

// A descriptor of columns: panels of 64 of them, 128 bytes a row, `kPanelBytes` apart, the 16-byte
// parts of 8 rows swizzled by the row's number; the address is a multiple of 1,024.
template <uint32_t kPanelBytes>
__device__ __forceinline__ uint64_t SwizzledColumns(uint32_t shared_address) {
  return RowsDescriptor((kPanelBytes >> 4) << 16 | (shared_address >> 4));
}

}  // namespace dsv4
