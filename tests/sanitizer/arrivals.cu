// What racecheck sees of a transaction barrier: why the library that it checks is compiled with
// DSV4_LANES_ARRIVE.
//
//   nvcc -std=c++17 -arch=sm_90a -lineinfo -I ffi/cuda tests/sanitizer/arrivals.cu -o arrivals
//   for form in 0 1 2; do compute-sanitizer --tool racecheck ./arrivals $form; done
//
// A warp fills shared memory and arrives, another waits and reads. compute-sanitizer 2025.3.1 and
// 2026.4.0 report:
//   0: one lane arrives for the warp, after __syncwarp. Right, yet 124 hazards, the 4 bytes of 31
//      lanes: what the arriving thread itself has written is taken along, not what __syncwarp has
//      ordered before its arrival.
//   1: each lane arrives. Right, and no hazard.
//   2: as 1, but nobody waits. A race, and 128 hazards.
#include <cstdio>
#include <cstdlib>

#include "mbarrier.cuh"

__global__ void HandOver(int form, int* out) {
  __shared__ int values[32];
  __shared__ uint64_t full;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    dsv4::InitBarrier(&full, form == 0 ? 1 : 32);
    dsv4::FenceBarrierInit();
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    values[lane] = lane;
    if (form == 0) __syncwarp();
    if (form != 0 || lane == 0) dsv4::Arrive(&full);
  } else {
    if (form != 2) dsv4::WaitBarrier(&full, 0);
    out[lane] = values[lane];
  }
}

int main(int, char** arguments) {
  int* out;
  cudaMalloc(&out, 32 * sizeof(int));
  HandOver<<<1, 64>>>(std::atoi(arguments[1]), out);
  std::puts(cudaGetErrorString(cudaDeviceSynchronize()));
}
