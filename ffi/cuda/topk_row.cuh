// Selection of the k largest of a row that a block, or a cluster of them, holds in registers.
//
// A thread's elements, or some threads', are a group. Of as many groups as there are to choose, the
// least of their largest numbers is a bound from which on there are enough. What is not below it is
// counted in equal bins up to the largest number; blocks send each other their counts. Elements
// above the bin of the k-th are chosen; the first block compares those within. Where they are many,
// or numbers are not finite, keys are counted instead, a digit after the other.
#pragma once

#include <type_traits>

#include "topk.cuh"
#include "topk_cluster.cuh"

namespace dsv4::row {

constexpr uint32_t kPairs = kBins / 2;
static_assert(kPairs == kSelectThreads, "a thread finds out about a pair of bins");

struct BlockBounds {
  uint32_t lowest, highest;  // keys
};

template <bool kSpread>
struct SelectShared {
  uint32_t counts[kBins];  // of this block
  // Counts of pairs of bins, in halves, of each block.
  alignas(16) uint32_t of_blocks[kSpread ? kMaxCluster : 1][kSpread ? kPairs : 4];
  uint64_t bounds[kMaxCluster];
  Candidate members[kLanes];  // of the bin of the k-th
  uint32_t num_members;
  uint32_t warp_sums[2][kSelectWarps];
  BlockBounds warps[kSelectWarps];
  uint64_t bounds_in, counts_in, members_in, chosen_in;  // barriers
};

// Numbers are counted in bins as kFirstBin + bin: in a float32 of that size bins are the last bits.
constexpr float kFirstBin = 1 << 23;

// Without a branch, which would be most of a thread's instructions.
__device__ __forceinline__ void CountNumber(uint32_t* counts, float x) {
  const uint32_t offset = (__float_as_uint(x) - __float_as_uint(kFirstBin)) * sizeof(uint32_t);
  asm volatile(
      "{\n.reg .pred counted;\n"
      "setp.ge.f32 counted, %0, %1;\n"
      "@counted red.shared.add.u32 [%2], 1;\n}" ::"f"(x),
      "f"(kFirstBin), "r"(SharedAddress(counts) + offset)
      : "memory");
}

// The block's part of a row; a thread has every kSelectThreads-th element.
struct Part {
  const float* row;
  uint32_t begin, end;

  __device__ __forceinline__ uint32_t IndexOf(int i) const {
    return begin + threadIdx.x + i * kSelectThreads;
  }

  template <int kPerThread>
  __device__ __forceinline__ void Load(float (&x)[kPerThread]) const {
    const float* mine = row + IndexOf(0);
    if (end - begin == kPerThread * kSelectThreads) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) x[i] = __ldg(mine + i * kSelectThreads);
    } else {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        x[i] = IndexOf(i) < end ? __ldg(mine + i * kSelectThreads) : __uint_as_float(0x7fffffffu);
      }
    }
  }

  __device__ __forceinline__ Candidate Load(int i) const {
    return MakeCandidate(ScoreKey(__ldg(row + IndexOf(i))), IndexOf(i));
  }
};

// A thread's elements as bits: those chosen for sure, and those among which the rest is chosen.
template <int kPerThread>
struct Choice {
  using Mask = std::conditional_t<kPerThread <= 32, uint32_t, uint64_t>;
  Mask sure = 0, members = 0;
  uint32_t num_members = 0, needed = 0;  // of the row
  uint32_t sure_before = 0;              // in the blocks before, this thread's share
  uint32_t members_before = 0;           // in the blocks before

  __device__ __forceinline__ void TakeAllMembers() {
    sure |= members;
    members = 0;
    if (threadIdx.x == 0) sure_before += members_before;
  }
};

template <int kPerThread, bool kSpread>
struct Selection {
  using Chosen = Choice<kPerThread>;
  using Mask = typename Chosen::Mask;

  SelectShared<kSpread>& shared;
  uint32_t num_blocks, rank, length, k;
  Part part;
  bool parity = false;

  // The block's own counts of a pair of bins.
  __device__ __forceinline__ uint2& OfBlock(uint32_t pair) const {
    return reinterpret_cast<uint2*>(shared.counts)[pair];
  }

  // Of the counts of a pair of bins, the sum of the first `blocks` blocks'.
  __device__ __forceinline__ uint2 Sum(uint32_t pair, uint32_t blocks) const {
    if (!kSpread) return OfBlock(pair);
    uint2 sum{0, 0};
#pragma unroll
    for (uint32_t i = 0; i < kMaxCluster; ++i) {
      const uint32_t counts = i < blocks ? shared.of_blocks[i][pair] : 0;
      sum = {sum.x + counts % 65536, sum.y + counts / 65536};
    }
    return sum;
  }

  // After all counts.
  __device__ __forceinline__ void ShareCounts() {
    __syncthreads();
    if (!kSpread) return;
    const uint2 mine = OfBlock(threadIdx.x);
    auto& own = shared.of_blocks[rank];
    own[threadIdx.x] = mine.x | mine.y << 16;
    FenceCopies();
    __syncthreads();
    const uint32_t warp = threadIdx.x / kLanes;
    if (threadIdx.x % kLanes == 0 && warp < num_blocks && warp != rank) {
      SendCopy(own, own, sizeof(own), &shared.counts_in, warp);
    }
    if (threadIdx.x == 0) {
      ArriveExpectingBytes(&shared.counts_in, (num_blocks - 1) * sizeof(own));
    }
    WaitBarrier(&shared.counts_in, parity);
    parity = !parity;
  }

  // The bin in which the sum of counts from above reaches choice.needed.
  __device__ __forceinline__ uint32_t FindBin(Chosen& choice) {
    const Bin found = dsv4::FindBin([&](uint32_t pair) { return Sum(pair, num_blocks); },
                                    choice.needed, shared.warp_sums[0]);
    choice.needed -= found.above;
    choice.num_members = found.count;
    if (kSpread) {
      const uint2 before = Sum(threadIdx.x, rank), members = Sum(found.bin / 2, rank);
      if (2 * threadIdx.x > found.bin) choice.sure_before += before.x;
      if (2 * threadIdx.x + 1 > found.bin) choice.sure_before += before.y;
      choice.members_before = found.bin % 2 ? members.y : members.x;
      __syncwarp();
      ArriveAtCluster();  // What other blocks sent has been read.
    }
    return found.bin;
  }

  // The least of the largest keys of k or more groups of the row, kNaN where a group has no
  // number, and the largest key.
  __device__ __forceinline__ BlockBounds FindBounds(const float (&x)[kPerThread]) {
    const uint32_t groups = (k + num_blocks - 1) / num_blocks;  // of this block
    float largest[4] = {x[0], x[1], x[2], x[3]};
#pragma unroll
    for (int i = 4; i < kPerThread; ++i) largest[i % 4] = fmaxf(largest[i % 4], x[i]);
    const float halves[2] = {fmaxf(largest[0], largest[2]), fmaxf(largest[1], largest[3])};
    const uint32_t highest = ScoreKey(fmaxf(halves[0], halves[1]));
    uint32_t lowest = highest;
    if (groups <= kSelectThreads) {
      for (uint32_t size = 1; size < kLanes && 2 * size * groups <= kSelectThreads; size *= 2) {
        lowest = max(lowest, __shfl_xor_sync(kWholeWarp, lowest, size));
      }
    } else if (groups <= 2 * kSelectThreads) {
      lowest = min(ScoreKey(halves[0]), ScoreKey(halves[1]));
    } else {
#pragma unroll
      for (float each : largest) lowest = min(lowest, ScoreKey(each));
    }
    const uint32_t lane = threadIdx.x % kLanes;
    BlockBounds bounds{__reduce_min_sync(kWholeWarp, lowest),
                       __reduce_max_sync(kWholeWarp, highest)};
    if (lane == 0) shared.warps[threadIdx.x / kLanes] = bounds;
    __syncthreads();
    bounds = shared.warps[lane % kSelectWarps];
    bounds = {__reduce_min_sync(kWholeWarp, bounds.lowest),
              __reduce_max_sync(kWholeWarp, bounds.highest)};
    if (!kSpread) return bounds;
    if (threadIdx.x < num_blocks) {
      SendNumber(&shared.bounds[rank], uint64_t{bounds.highest} << 32 | bounds.lowest,
                 &shared.bounds_in, threadIdx.x);
    }
    WaitBarrier(&shared.bounds_in, 0);
    const uint64_t other = shared.bounds[lane & (num_blocks - 1)];
    return {__reduce_min_sync(kWholeWarp, static_cast<uint32_t>(other)),
            __reduce_max_sync(kWholeWarp, static_cast<uint32_t>(other >> 32))};
  }

  // Counts numbers in bins of equal width.
  __device__ __forceinline__ void ChooseByNumbers(float (&x)[kPerThread], float lowest,
                                                  float scale, Chosen& choice) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      x[i] = fmaf(x[i] - lowest, scale, kFirstBin);
      CountNumber(shared.counts, x[i]);
    }
    ShareCounts();
    choice.needed = k;
    const float from = kFirstBin + FindBin(choice);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (x[i] == from) choice.members |= Mask{1} << i;
      if (x[i] > from) choice.sure |= Mask{1} << i;
    }
  }

  // Divides the range of the k-th until its members are few: first by key, then by index.
  __device__ __forceinline__ void ChooseByKeys(const BlockBounds& bounds, bool counted,
                                               Chosen& choice) {
    choice = {};
    choice.needed = k;
    constexpr int kIndexBits = 32;
    Candidate lowest = uint64_t{bounds.lowest} << kIndexBits;
    int bits = 2 * kIndexBits - __clz(bounds.highest - bounds.lowest);
    do {
      if (kSpread && counted) WaitForCluster();
      __syncthreads();
      if (counted) OfBlock(threadIdx.x) = {0, 0};
      counted = true;
      __syncthreads();
      if (bits == kIndexBits) {  // one key
        bits -= __clz(length - 1);
        lowest += (Candidate{1} << kIndexBits) - (Candidate{1} << bits);
      }
      const int shift = max(bits - kBinBits, bits > kIndexBits ? kIndexBits : 0);
      ForEach([&](int, Candidate candidate) {
        const uint64_t bin = (candidate - lowest) >> shift;
        if (candidate >= lowest && bin >> (bits - shift) == 0) {
          atomicAdd(&shared.counts[bin], 1u);
        }
      });
      ShareCounts();
      lowest += uint64_t{FindBin(choice)} << shift;
      bits = shift;
    } while (choice.num_members > kLanes && choice.num_members > choice.needed);
    ForEach([&](int i, Candidate candidate) {
      if (candidate < lowest) return;
      ((candidate - lowest) >> bits == 0 ? choice.members : choice.sure) |= Mask{1} << i;
    });
  }

  // use(i, candidate) for each element, several of which are loaded together.
  template <typename Use>
  __device__ __forceinline__ void ForEach(Use use) const {
    constexpr int kTogether = 4;
#pragma unroll 1
    for (int first = 0; part.IndexOf(first) < part.end; first += kTogether) {
      Candidate candidates[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        candidates[i] = part.IndexOf(first + i) < part.end ? part.Load(first + i) : 0;
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (candidates[i] != 0) use(first + i, candidates[i]);
      }
    }
  }

  template <typename Use>
  __device__ __forceinline__ void ForEachOf(Mask mask, Use use) const {
#pragma unroll 1
    for (; mask != 0; mask &= mask - 1) {
      use(part.Load((kPerThread <= 32 ? __ffs(mask) : __ffsll(mask)) - 1));
    }
  }

  // Of a row with more than k elements.
  __device__ __forceinline__ Chosen Choose(float (&x)[kPerThread]) {
    const BlockBounds bounds = FindBounds(x);
    const float lowest = ScoreOfKey(bounds.lowest);
    const float scale = __fdividef(kBins - 1.5f, ScoreOfKey(bounds.highest) - lowest);
    Chosen choice;
    const bool regular = scale > 0 && scale < INFINITY;  // not for NaN
    if (regular) ChooseByNumbers(x, lowest, scale, choice);
    if (!regular || (choice.num_members > kLanes && choice.num_members > choice.needed)) {
      ChooseByKeys(bounds, regular, choice);
    }
    if (choice.num_members == choice.needed) choice.TakeAllMembers();
    return choice;
  }

  __device__ __forceinline__ Chosen TakeAll() const {
    Chosen choice;
    if (threadIdx.x == 0) choice.sure_before = part.begin;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (part.IndexOf(i) < part.end) choice.sure |= Mask{1} << i;
    }
    return choice;
  }

  // emit(position, candidate) for what this block stores; the first block has the members.
  template <typename Emit>
  __device__ __forceinline__ void EmitChosen(const Chosen& choice, Emit emit) {
    const bool compared = choice.num_members != choice.needed;
    if (kSpread && compared && rank == 0 && threadIdx.x == 0) {
      ArriveExpectingBytes(&shared.members_in, choice.num_members * sizeof(Candidate));
    }
    ForEachOf(choice.members, [&](Candidate candidate) {
      Candidate* place =
          &shared.members[choice.members_before + atomicAdd(&shared.num_members, 1u)];
      if (kSpread) {
        SendNumber(place, candidate, &shared.members_in, 0);
      } else {
        *place = candidate;
      }
    });
    const uint32_t num_sure = kPerThread <= 32 ? __popc(choice.sure) : __popcll(choice.sure);
    const uint32_t packed = num_sure | choice.sure_before << 16;
    const Sums sums = BlockSums(packed, shared.warp_sums[1]);
    uint32_t at = sums.before % 65536 + sums.total / 65536;
    ForEachOf(choice.sure, [&](Candidate candidate) { emit(at++, candidate); });
    if (!compared || rank != 0) return;
    if (kSpread) WaitBarrier(&shared.members_in, 0);
    if (threadIdx.x >= choice.num_members) return;
    const Candidate mine = shared.members[threadIdx.x];
    uint32_t better = 0;
#pragma unroll 4
    for (uint32_t i = 0; i < choice.num_members; ++i) better += shared.members[i] > mine;
    if (better < choice.needed) emit(k - choice.needed + better, mine);
  }
};

template <int kPerThread, bool kSpread, bool kSorted>
__global__ void __launch_bounds__(kSelectThreads, kPerThread <= 32 ? kBlocksPerSm : 1)
    SelectRows(const float* __restrict__ scores, const int32_t* __restrict__ lengths, uint32_t n,
               uint32_t k, float* __restrict__ values, int32_t* __restrict__ indices) {
  __shared__ __align__(16) SelectShared<kSpread> shared;
  __shared__ Candidate chosen[kSorted ? kMaxSelectK : 1];
  const auto cluster = cooperative_groups::this_cluster();
  const uint32_t num_blocks = kSpread ? cluster.num_blocks() : 1;
  const uint32_t rank = kSpread ? cluster.block_rank() : 0;
  const int64_t row = blockIdx.x / num_blocks;
  const uint32_t length =
      lengths == nullptr ? n : min(static_cast<uint32_t>(max(__ldg(lengths + row), 0)), n);
  const uint32_t size = (length + num_blocks - 1) / num_blocks, begin = min(rank * size, length);
  const Part part{scores + row * n, begin, min(begin + size, length)};
  const uint32_t found = min(length, k);
  Selection<kPerThread, kSpread> selection{shared, num_blocks, rank, length, k, part};

  float x[kPerThread];
  part.Load(x);
  selection.OfBlock(threadIdx.x) = {0, 0};
  if (threadIdx.x == 0) shared.num_members = 0;
  if (kSpread) {
    if (threadIdx.x == 0) {
      InitBarrier(&shared.bounds_in, 1);
      InitBarrier(&shared.counts_in, 1);
      InitBarrier(&shared.members_in, 1);
      InitBarrier(&shared.chosen_in, 1);
      FenceBarrierInit();
      ArriveExpectingBytes(&shared.bounds_in, num_blocks * sizeof(uint64_t));
      ArriveExpectingBytes(&shared.chosen_in, found * sizeof(Candidate));
    }
    __syncwarp();
    ArriveAtCluster();
    WaitForCluster();
  }

  const Best best{values + row * k, indices + row * k};
  const auto choice = length > k ? selection.Choose(x) : selection.TakeAll();
  selection.EmitChosen(choice, [&](uint32_t at, Candidate candidate) {
    if (!kSorted) {
      best.Store(at, candidate);
    } else if (kSpread) {
      SendNumber(&chosen[at], candidate, &shared.chosen_in, 0);
    } else {
      chosen[at] = candidate;
    }
  });
  __syncwarp();
  if (kSpread && length > k) WaitForCluster();  // All have what this block sent.
  if (rank != 0) return;
  if (kSorted) {
    const uint32_t padded = max(2u << (31 - __clz((k - 1) | 1)), kSelectThreads);
    for (uint32_t i = found + threadIdx.x; i < padded; i += kSelectThreads) chosen[i] = 0;
    if (kSpread) WaitBarrier(&shared.chosen_in, 0);
    __syncthreads();
    BitonicSort(chosen, padded);
    for (uint32_t i = threadIdx.x; i < found; i += kSelectThreads) best.Store(i, chosen[i]);
  }
  for (uint32_t i = found + threadIdx.x; i < k; i += kSelectThreads) {
    best.values[i] = -INFINITY;
    best.indices[i] = -1;
  }
}

}  // namespace dsv4::row
