// The kernel of hyper-connections that collapses streams, after it has spread an output or not.
#pragma once

#include "hyper_gates.cuh"
#include "hyper_mixer.cuh"

namespace dsv4 {
namespace hyper {

__device__ __forceinline__ void InitBarriers(Shared& s) {
  for (uint32_t i = 0; i < kSlots; ++i) {
    InitBarrier(&s.summed[i], kMixWarps);
    InitBarrier(&s.gathered[i], 1);
    InitBarrier(&s.gated[i], 1);
    InitBarrier(&s.collapsed[i], kMixWarps);
    InitBarrier(&s.squared[i], 1);
    InitBarrier(&s.normed[i], 1);
  }
  FenceBarrierInit();
}

// A cluster owns tiles of 8 tokens. Each of its blocks has 256 channels of all four streams and
// keeps its part of the projection in registers, split into two bfloat16 terms, so that a product
// of the tensor cores is as good as one in float32. The threads of the first eight warps mix their
// own 8 channels of one token; every warp contributes to the 24 projections and the sum of squares.
// A gate warp adds up the warps' sums and sends them to the block that owns the token, which adds
// up what all blocks sent and turns it into gates for all of them. Two tiles later these collapse
// the streams, which have stayed in shared memory; the norm warp exchanges the squares of the
// result, and another tile later the row is normed. All sums have a fixed order.
template <bool kSpread>
__global__ void __launch_bounds__(kThreads, 1) HcPre(const __grid_constant__ Problem p) {
  extern __shared__ __align__(16) uint8_t dynamic[];
  Shared& shared = *reinterpret_cast<Shared*>(dynamic);
  if (threadIdx.x == 0) InitBarriers(shared);
  __syncwarp();
  ArriveAtCluster();
  Place place(p);
  int warp = threadIdx.x / kWarp;
  if (warp < kMixWarps) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    Mixer<kSpread>(p, place, shared).Run();
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 72;");
    if (warp == kNormWarp) {
      NormScales(p, place, shared);
    } else {
      Gates(p, place, shared).Run();
    }
  }
}

}  // namespace hyper
}  // namespace dsv4
