// The launches of sparse attention of many queries.
#pragma once

#include <algorithm>

#include "attention_fill.cuh"
#include "attention_prefill.cuh"

namespace dsv4 {

// Fills the workspace and attends.
inline cudaError_t LaunchPrefill(cudaStream_t stream, const PrefillProblem& p) {
  // Of the current device.
  const cudaError_t allowed = cudaFuncSetAttribute(
      AttendPrefill, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(PrefillShared));
  if (allowed != cudaSuccess) return allowed;
  int device = 0, num_multiprocessors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const dim3 fill_blocks((WorkspaceRows(p.a) + kFillWarps - 1) / kFillWarps,
                         p.a.num_queries / p.a.tokens);
  FillWorkspace<<<fill_blocks, 32 * kFillWarps, 0, stream>>>(p);
  const cudaError_t filled = cudaGetLastError();
  if (filled != cudaSuccess) return filled;
  // Launched while the workspace is filled, it waits for that on the device.
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = std::min(p.num_items, num_multiprocessors);
  config.blockDim = kPrefillThreads;
  config.dynamicSmemBytes = sizeof(PrefillShared);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, AttendPrefill, p);
}

}  // namespace dsv4
