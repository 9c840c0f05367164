// Products of a warpgroup (wgmma, sm_90a) beyond those of moe_hopper.cuh: 128 and 256 columns.
#pragma once

#include "moe_hopper.cuh"

namespace dsv4 {

// All but the `kPending` groups of products committed last are complete.
template <int kPending>
__device__ __forceinline__ void WaitProductsExcept() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define DSV4_ACC8(i)                                                                    \
  "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), \
      "+f"(acc[i + 5]), "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define DSV4_ACC32(i) DSV4_ACC8(i), DSV4_ACC8(i + 8), DSV4_ACC8(i + 16), DSV4_ACC8(i + 24)
#define DSV4_REGISTERS_0_31                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DSV4_REGISTERS_0_63                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DSV4_REGISTERS_64_127                                                            \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "     \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "     \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "     \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
  "%124, %125, %126, %127"

__device__ __forceinline__ void MultiplyAsync(float (&acc)[64], const Fragment& a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" DSV4_REGISTERS_0_63
               "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
               : DSV4_ACC32(0), DSV4_ACC32(32)
               : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(b));
}

__device__ __forceinline__ void MultiplyAsync(float (&acc)[128], const Fragment& a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" DSV4_REGISTERS_0_63
               ", " DSV4_REGISTERS_64_127 "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 0;"
               : DSV4_ACC32(0), DSV4_ACC32(32), DSV4_ACC32(64), DSV4_ACC32(96)
               : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(b));
}

// acc = a b, or += where `accumulate`, of 64 x 32 by 32 x (2 * size of acc) E4M3 codes.
__device__ __forceinline__ void MultiplyCodesAsync(float (&acc)[32], const uint4& a, uint64_t b,
                                                   bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" DSV4_REGISTERS_0_31
      "}, {%32, %33, %34, %35}, %36, p, 1, 1;\n}"
      : DSV4_ACC32(0)
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(int{accumulate}));
}

__device__ __forceinline__ void MultiplyCodesAsync(float (&acc)[64], const uint4& a, uint64_t b,
                                                   bool accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" DSV4_REGISTERS_0_63
      "}, {%64, %65, %66, %67}, %68, p, 1, 1;\n}"
      : DSV4_ACC32(0), DSV4_ACC32(32)
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(int{accumulate}));
}

#undef DSV4_REGISTERS_64_127
#undef DSV4_REGISTERS_0_63
#undef DSV4_REGISTERS_0_31
#undef DSV4_ACC32
#undef DSV4_ACC8

}  // namespace dsv4
