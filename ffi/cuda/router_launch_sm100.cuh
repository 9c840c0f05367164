// The dense router on devices of compute capability 10.x. Libraries built for Hopper alone lack
// the function; it is null there.
#pragma once

#include <cuda_runtime.h>

#include "dsv4/router.h"

namespace dsv4 {

// The arguments of dense_router, checked, with at least one token.
struct DenseRouterCall {
  ffi::AnyBuffer x, gate, scales, global_scale, bias;
  float scale;
  ffi::AnyBuffer weights, ids, scores;
};

__attribute__((weak)) ffi::Error LaunchDenseRouterSm100(cudaStream_t stream,
                                                        const DenseRouterCall& call);

}  // namespace dsv4
