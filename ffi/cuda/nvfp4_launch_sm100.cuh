// Products of two NVFP4 operands on devices of compute capability 10.x.
#pragma once

#include <cuda_runtime.h>

#include "dsv4/nvfp4_gemm.h"

namespace dsv4 {

// Launches the product; one launch, no synchronisation, no workspace. Rows of `out` beyond the
// last group are not written. An error on other devices, and where the driver has no tensor maps.
ffi::Error LaunchNvfp4GemmSm100(cudaStream_t stream, const Nvfp4GemmCall& call);

}  // namespace dsv4
