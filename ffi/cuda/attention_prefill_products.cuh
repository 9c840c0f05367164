// Products of a warpgroup (wgmma, sm_90a) for attention of many queries: 64 queries by 64 entries,
// and weights held in registers by 256 channels of 16 entries.
#pragma once

#include "attention_products.cuh"

namespace dsv4 {

#define DSV4_F8(x, i)                                                                             \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), \
      "+f"(x[i + 6]), "+f"(x[i + 7])
#define DSV4_F32(x, i) DSV4_F8(x, i), DSV4_F8(x, i + 8), DSV4_F8(x, i + 16), DSV4_F8(x, i + 24)

// acc = a b, or += where `accumulate`: 64 x 16 by the transpose of 64 x 16.
__device__ __forceinline__ void MultiplyRowsAsync(float (&acc)[32], uint64_t a, uint64_t b,
                                                  bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, "
      "%8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;\n}"
      : DSV4_F32(acc, 0)
      : "l"(a), "l"(b), "r"(int{accumulate}));
}

// acc += a b: 64 x 16, the warp's 16 rows of them, by 16 x 256.
__device__ __forceinline__ void MultiplyColumnsAsync(float (&acc)[128], const Fragment& a,
                                                     uint64_t b) {
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
      "%127}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;"
      : DSV4_F32(acc, 0), DSV4_F32(acc, 32), DSV4_F32(acc, 64), DSV4_F32(acc, 96)
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(b));
}

#undef DSV4_F32
#undef DSV4_F8

}  // namespace dsv4
