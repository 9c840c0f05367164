// Products with tiled weights on devices of compute capability 10.x. Libraries built for Hopper
// alone lack these functions; they are null there.
#pragma once

#include <cuda_runtime.h>

#include "dsv4/gemm.h"
#include "dsv4/moe.h"

namespace dsv4 {

// A workspace may be larger than is needed.
struct ExpertWorkspace {
  void* memory;
  int64_t num_bytes;
};

__attribute__((weak)) ffi::Error LaunchGemmSm100(cudaStream_t stream, const GemmCall& call);
__attribute__((weak)) ffi::Error LaunchMoeSm100(cudaStream_t stream, const MoeCall& call,
                                                const ExpertWorkspace& workspace);
__attribute__((weak)) ffi::Error LaunchGroupedGemmSm100(cudaStream_t stream,
                                                        const GroupedGemmCall& call,
                                                        const ExpertWorkspace& workspace);

}  // namespace dsv4
