// A dense router's product for many tokens: a tile of experts by all tokens, over a slice of the
// width, through shared memory (sm_90a).
#pragma once

#include "moe_hopper.cuh"
#include "router_dense_sums.cuh"
#include "router_gate.cuh"

namespace dsv4 {

// acc += a bᵀ of 64 x 16 by 16 x 16.
__device__ __forceinline__ void MultiplyRows(float (&acc)[8], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, "
      "%8, %9, 1, 1, 1, 0, 0;"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]), "+f"(acc[4]), "+f"(acc[5]),
        "+f"(acc[6]), "+f"(acc[7])
      : "l"(a), "l"(b));
}

// All but the `pending` groups of copies committed last, up to three, are complete.
__device__ __forceinline__ void WaitCopiesExcept(int pending) {
  if (pending == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
  if (pending == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
  if (pending == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
  if (pending == 3) asm volatile("cp.async.wait_group 3;" ::: "memory");
}

// Up to 64 tokens: each warpgroup multiplies 16 experts; operands come through shared memory.
template <int kPanelsAtOnce, int kPerLane_, bool kFull_>
struct ManyTokens {
  static constexpr int kTokens = 64, kExpertsOfWarpgroup = 16;
  static constexpr int kExperts = 2 * kExpertsOfWarpgroup;
  static constexpr int kPanel = 64, kPanels = 4 * kPanelsAtOnce;  // columns: rows of 128 bytes
  static constexpr int kColumns = kPanels * kPanel;
  static constexpr int kPerLane = kPerLane_;
  static constexpr bool kFull = kFull_;
  static constexpr int kPolled = !kFull ? 5 : 4 + (kPerLane > 8);
  static constexpr bool kPrefetches = false;
  static constexpr bool kThroughShared = true;

  struct Shared {
    uint16_t x[kPanels][kTokens][kPanel], gate[kPanels][kExperts][kPanel];
  };

  // Columns from `begin` on, swizzled as the products want them; four groups of copies.
  template <typename Gate>
  static __device__ __forceinline__ void Load(const Problem& p, const Gate& gate, int begin,
                                              int end, Shared& shared) {
    constexpr int kParts = kPanel / 8, kRowsAtOnce = kThreads / kParts;
    static_assert(kRowsAtOnce == kExperts, "a thread copies one part of the gate");
    const int part = threadIdx.x % kParts, row = threadIdx.x / kParts;
    const int expert = blockIdx.x * kExperts + row, swizzled = (part ^ row) % 8 * 8;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const int column = begin + panel * kPanel + part * 8;
      gate.Copy8(&shared.gate[panel][row][swizzled], expert, column,
                 column < end && expert < p.num_experts);
#pragma unroll
      for (int i = 0; i < kTokens / kRowsAtOnce; ++i) {
        const int token = row + i * kRowsAtOnce;
        CopyLater(&shared.x[panel][token][swizzled], p.x + int64_t{token} * p.width + column,
                  column < end && token < p.num_tokens);
      }
      if (panel % kPanelsAtOnce == kPanelsAtOnce - 1) {
        asm volatile("cp.async.commit_group;" ::: "memory");
      }
    }
  }

  template <typename Gate>
  static __device__ __forceinline__ void PublishSums(const Problem& p, const Gate& gate,
                                                     Shared& shared) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int of_tile = warp / 4 * kExpertsOfWarpgroup;
    const int slice = blockIdx.y * p.slice, end = min(slice + p.slice, p.width);
    float acc[8] = {};
#pragma unroll 1
    for (int begin = slice; begin < end; begin += kColumns) {
      if (begin > slice) Sync<kWorkers>();
      Load(p, gate, begin, end, shared);
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        if (panel % kPanelsAtOnce == 0) {
          WaitCopiesExcept(3 - panel / kPanelsAtOnce);
          FenceAsync();
          Sync<kWorkers>();
        }
        const uint32_t x = RowsDescriptorLow(SharedAddress(shared.x[panel]));
        const uint32_t experts = RowsDescriptorLow(SharedAddress(shared.gate[panel][of_tile]));
        FenceProducts();
#pragma unroll
        for (int i = 0; i < kPanel / 16; ++i) {
          MultiplyRows(acc, RowsDescriptor(x + 2 * i), RowsDescriptor(experts + 2 * i));
        }
        CommitProducts();
      }
      WaitProducts(acc);
    }
    const int token = warp % 4 * 16 + lane / 4, padded_experts = gridDim.x * kExperts;
    uint32_t* sums = reinterpret_cast<uint32_t*>(arena) + p.first_sum;
    uint32_t* to = sums + (token * p.num_slices + blockIdx.y) * padded_experts;
    uint32_t* later = to + 8 * p.num_slices * padded_experts;
#pragma unroll
    for (int i = 0; i < kExpertsOfWarpgroup / 8; ++i) {
      const int expert = blockIdx.x * kExperts + of_tile + 8 * i + lane % 4 * 2;
      if (expert >= p.NumQuads() * 4) break;
      const float* sum = acc + 4 * i;
      if (token < p.num_tokens) Publish(to + expert, Encode(sum[0]), Encode(sum[1]));
      if (token + 8 < p.num_tokens) Publish(later + expert, Encode(sum[2]), Encode(sum[3]));
    }
  }
};

}  // namespace dsv4
