// Sums of a gate's product for many tokens: tiles of 128 tokens and 128 experts over a slice of the
// width (sm_90a).
#pragma once

#include "cluster.cuh"
#include "warpgroup.cuh"

namespace dsv4 {

constexpr int kGateTile = 128;        // tokens, and experts
constexpr int kGateStageColumns = 64;  // rows of 128 bytes
constexpr int kGateStages = 6;
constexpr int kGateOperandBytes = kGateTile * kGateStageColumns * 2;
constexpr int kGateStageBytes = 2 * kGateOperandBytes;
constexpr int kGateAlignment = 1024;
constexpr int kGateDynamicBytes = kGateStages * kGateStageBytes + kGateAlignment;
constexpr int kGateWarpgroups = kGateTile / 64;  // that multiply; one more warp copies
constexpr int kGateWorkers = kGateWarpgroups * 128;
constexpr int kGateThreads = kGateWorkers + 32;
// Two blocks with the same tokens fill each other's stages where there are that many experts.
constexpr int kMaxGatePeers = 2;

struct GateProduct {
  TensorMap x;     // boxes of the part of a tile that a block copies for its peers
  TensorMap gate;  // boxes of tiles
  int num_tokens, num_stages;
  int64_t pitch;
  float* sums;  // [slices, num_tokens, pitch]
};

#define DSV4_ACC8(i)                                                                    \
  "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), \
      "+f"(acc[i + 5]), "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define DSV4_ACC32(i) DSV4_ACC8(i), DSV4_ACC8(i + 8), DSV4_ACC8(i + 16), DSV4_ACC8(i + 24)

// acc += a bᵀ of 64 x 16 by 128 x 16.
__device__ __forceinline__ void MultiplyRows(float (&acc)[64], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, 1, 1, 1, 0, 0;"
      : DSV4_ACC32(0), DSV4_ACC32(32)
      : "l"(a), "l"(b));
}

#undef DSV4_ACC32
#undef DSV4_ACC8

__device__ __forceinline__ void LoadBoxForAll(void* destination, const TensorMap& map,
                                              int32_t column, int32_t row, uint64_t* barrier,
                                              uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(SharedAddress(destination)),
      "l"(&map), "r"(column), "r"(row), "r"(SharedAddress(barrier)), "h"(ranks)
      : "memory");
}

__device__ __forceinline__ void StoreBulk(void* destination, const void* source, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination),
               "r"(SharedAddress(source)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void WaitForBulkStores() {
  asm volatile(
      "cp.async.bulk.commit_group;\n"
      "cp.async.bulk.wait_group 0;" ::
          : "memory");
}

// Programmatic dependent launch: the next kernel's blocks may come, which wait for this one's end
// before they read what it wrote.
__device__ __forceinline__ void AllowNextKernel() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void WaitForPreviousKernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

struct GateBarriers {
  uint64_t full[kGateStages], empty[kGateStages];
};

// A block: experts tile blockIdx.x, tokens tile blockIdx.y, slice blockIdx.z. Its cluster has the
// same tokens.
struct GateTileProduct {
  const GateProduct& p;
  uint8_t* stages;
  GateBarriers& barriers;
  int peers, rank;  // blocks of the cluster, this one
  int begin = blockIdx.z * p.num_stages / gridDim.z;
  int end = (blockIdx.z + 1) * p.num_stages / gridDim.z;
  int first_expert = blockIdx.x * kGateTile, first_token = blockIdx.y * kGateTile;

  __device__ __forceinline__ void InitBarriers() const {
    for (int i = 0; i < kGateStages; ++i) {
      InitBarrier(&barriers.full[i], 1);
      InitBarrier(&barriers.empty[i], kGateWarpgroups * peers);
    }
    FenceBarrierInit();
  }

  // One thread.
  __device__ __forceinline__ void Copy() const {
    const int rows = kGateTile / peers, first_row = rank * rows;
    RingPosition<kGateStages> ring;
    for (int i = begin; i < end; ++i, ring.Advance()) {
      uint8_t* stage = stages + ring.slot * kGateStageBytes;
      uint64_t* full = &barriers.full[ring.slot];
      const int column = i * kGateStageColumns;
      WaitBarrier(&barriers.empty[ring.slot], ring.parity ^ 1);
      ArriveExpectingBytes(full, kGateStageBytes);
      LoadBoxForAll(stage + first_row * kGateStageColumns * 2, p.x, column,
                    first_token + first_row, full, (1 << peers) - 1);
      LoadBox(stage + kGateOperandBytes, p.gate, column, first_expert, full);
    }
  }

  __device__ __forceinline__ void Multiply(float (&acc)[64]) const {
    const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
    // A thread for each block that fills this one's stages.
    const bool tells = thread < peers;
    const uint32_t empty = ClusterAddress(barriers.empty, tells ? thread : 0);
    RingPosition<kGateStages> ring;
    uint32_t previous = 0;
    for (int i = begin; i < end; ++i, ring.Advance()) {
      WaitBarrier(&barriers.full[ring.slot], ring.parity);
      const uint32_t stage = SharedAddress(stages) + ring.slot * kGateStageBytes;
      const uint32_t x = RowsDescriptorLow(stage + warpgroup * 64 * kGateStageColumns * 2);
      const uint32_t gate = RowsDescriptorLow(stage + kGateOperandBytes);
      FenceProducts();
#pragma unroll
      for (int part = 0; part < kGateStageColumns / 16; ++part) {
        MultiplyRows(acc, RowsDescriptor(x + 2 * part), RowsDescriptor(gate + 2 * part));
      }
      CommitProducts();
      WaitProductsExcept<1>();
      // Only if the stage is filled again: then the block that waits has not ended.
      if (tells && i > begin && i - 1 + kGateStages < end) {
        SignalInCluster(empty + previous * sizeof(uint64_t));
      }
      previous = ring.slot;
    }
    WaitProducts(acc);
  }

  __device__ __forceinline__ void Store(const float (&acc)[64]) const {
    constexpr int kPitch = kGateTile + 8;  // without bank conflicts
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16;
    auto* rows = reinterpret_cast<float*>(stages);
    float* to = rows + (first_row + lane / 4) * kPitch + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kGateTile / 8; ++i) {
      *reinterpret_cast<float2*>(to + 8 * i) = {acc[4 * i], acc[4 * i + 1]};
      *reinterpret_cast<float2*>(to + 8 * kPitch + 8 * i) = {acc[4 * i + 2], acc[4 * i + 3]};
    }
    FenceAsync();
    __syncwarp();
    const int row = first_row + lane, token = first_token + row;
    if (lane < 16 && token < p.num_tokens && first_expert < p.pitch) {
      const int count = min(int64_t{kGateTile}, p.pitch - first_expert);
      StoreBulk(p.sums + (int64_t{blockIdx.z} * p.num_tokens + token) * p.pitch + first_expert,
                rows + row * kPitch, count * sizeof(float));
      WaitForBulkStores();
    }
  }
};

__global__ void __launch_bounds__(kGateThreads, 1)
    GateSums(const __grid_constant__ GateProduct p) {
  extern __shared__ uint8_t dynamic[];
  __shared__ GateBarriers barriers;
  uint32_t peers;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(peers));
  const GateTileProduct tile = {
      p, dynamic + (kGateAlignment - SharedAddress(dynamic) % kGateAlignment) % kGateAlignment,
      barriers, static_cast<int>(peers), static_cast<int>(blockIdx.x % peers)};
  const bool copies = threadIdx.x == kGateWorkers;
  if (copies) {
    PrefetchTensorMap(p.x);
    PrefetchTensorMap(p.gate);
    tile.InitBarriers();
  }
  __syncwarp();
  ArriveAtCluster();
  WaitForCluster();
  if (copies) tile.Copy();
  if (threadIdx.x >= kGateWorkers) return;
  float acc[64] = {};
  tile.Multiply(acc);
  AllowNextKernel();
  SyncThreads(1, kGateWorkers);  // every stage has been filled and read
  tile.Store(acc);
}

}  // namespace dsv4
