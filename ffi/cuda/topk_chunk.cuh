// Selection of the k largest of a row that one block holds in registers.
//
// Keys from the first bound on are counted in bins over their range. The bin of the k-th is divided
// again until it is chosen whole or a warp can compare its members.
#pragma once

#include "topk.cuh"

namespace dsv4::chunk {

struct SelectShared {
  Candidate members[kLanes];  // of one bin
  uint32_t counts[kBins];
  uint32_t num_members;
  uint32_t warp_sums[kSelectWarps], lowest[kSelectWarps], highest[kSelectWarps];
};

// Candidates from `lowest` on, below those that are chosen for sure; of them `needed` are chosen.
struct Range {
  Candidate lowest;
  int bits;
  uint32_t needed, count;

  __device__ __forceinline__ bool IsWhole() const { return count == needed; }
};

// The bin of the needed-th largest, counted in bins of so many bits from `lowest` on.
__device__ __forceinline__ Range FindRange(SelectShared& shared, Candidate lowest, int bits,
                                           uint32_t needed) {
  Bin found = FindBin(shared.counts, needed, shared.warp_sums);
  return {lowest + (uint64_t{found.bin} << bits), bits, needed - found.above, found.count};
}

// The range of the k-th of more keys.
__device__ __forceinline__ Range FindKeys(SelectShared& shared, const Keys& x, uint32_t k) {
  uint32_t lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, highest = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) highest = max(highest, x.keys[i]);
  highest = __reduce_max_sync(kWholeWarp, highest);
  uint32_t lowest = __reduce_min_sync(kWholeWarp, LeastOfGroups(x, k));
  if (lane == 0) shared.lowest[warp] = lowest, shared.highest[warp] = highest;
  __syncthreads();
  lowest = max(__reduce_min_sync(kWholeWarp, shared.lowest[lane % kSelectWarps]), kNaN);
  highest = __reduce_max_sync(kWholeWarp, shared.highest[lane % kSelectWarps]);

  const int bits = max(32 - __clz(highest - lowest) - kBinBits, 0);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (x.keys[i] >= lowest) atomicAdd(&shared.counts[(x.keys[i] - lowest) >> bits], 1u);
  }
  __syncthreads();
  return FindRange(shared, uint64_t{lowest} << 32, 32 + bits, k);
}

// Divides the range until it is chosen whole, and forgets the keys below it.
__device__ __forceinline__ void Divide(SelectShared& shared, Keys& x, Range& range) {
#pragma unroll 1
  while (!range.IsWhole()) {
    __syncthreads();
    for (int i = threadIdx.x; i < kBins; i += kSelectThreads) shared.counts[i] = 0;
    __syncthreads();
    const int bits = max(range.bits - kBinBits, 0);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      uint64_t bin = (x.At(i) - range.lowest) >> bits;
      if (x.At(i) >= range.lowest && bin >> (range.bits - bits) == 0) {
        atomicAdd(&shared.counts[bin], 1u);
      }
    }
    __syncthreads();
    range = FindRange(shared, range.lowest, bits, range.needed);
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (x.At(i) < range.lowest) x.keys[i] = kAbsent;
  }
}

// Which of the thread's keys are not below `lowest`.
__device__ __forceinline__ uint32_t Mask(const Keys& x, uint32_t lowest) {
  uint32_t mask = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (x.keys[i] >= lowest) mask |= 1u << i;
  }
  return mask;
}

// use(candidate) for each of the thread's elements in `mask`, which the row gives again: a loop
// over registers would be many times its body.
template <typename Use>
__device__ __forceinline__ void ForEach(const Keys& x, const float* row, uint32_t mask, Use use) {
#pragma unroll 1
  for (; mask != 0; mask &= mask - 1) {
    const uint32_t index = x.first_index + (__ffs(mask) - 1) * kLanes;
    use(MakeCandidate(ScoreKey(__ldg(row + index)), index));
  }
}

// emit(position, candidate) for the k best, or for all where they are no more.
template <typename Emit>
__device__ __forceinline__ void Select(SelectShared& shared, const float* row, Keys& x,
                                       uint32_t length, uint32_t k, Emit emit) {
  Range range{uint64_t{kNaN} << 32, 32, 0, 0};  // all but the absent
  if (length > k) {
    range = FindKeys(shared, x, k);
    if (range.count > kLanes) Divide(shared, x, range);
  }
  const uint32_t lowest = range.lowest >> 32;
  const uint32_t found = Mask(x, lowest);
  uint32_t chosen = found;
  if (!range.IsWhole()) {
    chosen = Mask(x, lowest + (1u << (range.bits - 32)));
    ForEach(x, row, found & ~chosen, [&](Candidate candidate) {
      shared.members[atomicAdd(&shared.num_members, 1u)] = candidate;
    });
  }
  const Sums sums = BlockSums(__popc(chosen), shared.lowest);
  uint32_t at = sums.before;
  ForEach(x, row, chosen, [&](Candidate candidate) { emit(at++, candidate); });
  if (range.IsWhole() || threadIdx.x >= range.count) return;
  const Candidate mine = shared.members[threadIdx.x];
  uint32_t rank = 0;
#pragma unroll 4
  for (uint32_t i = 0; i < range.count; ++i) rank += shared.members[i] > mine;
  if (rank < range.needed) emit(sums.total + rank, mine);
}

template <bool kSorted>
__global__ void __launch_bounds__(kSelectThreads, kBlocksPerSm)
    SelectChunks(const float* __restrict__ scores, const int32_t* __restrict__ lengths, uint32_t n,
                 uint32_t k, float* __restrict__ values, int32_t* __restrict__ indices) {
  __shared__ SelectShared shared;
  __shared__ Candidate chosen[kSorted ? kMaxSelectK : 1];
  for (int i = threadIdx.x; i < kBins; i += kSelectThreads) shared.counts[i] = 0;
  if (threadIdx.x == 0) shared.num_members = 0;
  const int64_t row = blockIdx.x;
  const uint32_t length =
      lengths == nullptr ? n : min(static_cast<uint32_t>(max(__ldg(lengths + row), 0)), n);
  const Best best{values + row * k, indices + row * k};
  if (length > 0) {
    Keys x(scores + row * n, 0, length);
    Select(shared, scores + row * n, x, length, k, [&](uint32_t at, Candidate candidate) {
      if (kSorted) {
        chosen[at] = candidate;
      } else {
        best.Store(at, candidate);
      }
    });
  }
  const uint32_t found = min(length, k);
  if (kSorted) {
    const uint32_t padded = max(2u << (31 - __clz((k - 1) | 1)), kSelectThreads);
    for (uint32_t i = found + threadIdx.x; i < padded; i += kSelectThreads) chosen[i] = 0;
    __syncthreads();
    BitonicSort(chosen, padded);
    for (uint32_t i = threadIdx.x; i < found; i += kSelectThreads) best.Store(i, chosen[i]);
  }
  for (uint32_t i = found + threadIdx.x; i < k; i += kSelectThreads) {
    best.values[i] = -INFINITY;
    best.indices[i] = -1;
  }
}

}  // namespace dsv4::chunk
