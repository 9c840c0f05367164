// What selections share, and the selection of a row's k largest scores by one thread block or by a
// cluster of them where registers do not hold the row.
//
// Blocks take consecutive parts of the row and read them in chunks. Scores that may be among the k
// largest are kept in shared memory as candidates. The first bound is the least of as many groups'
// largest keys as there are to choose; candidates that do not fit are pruned to the k best, whose
// least is the next bound. At last each block prunes its candidates, and the first block gathers
// and selects. A selection counts candidates in bins over their range: where the bin of the k-th
// holds few, they are compared, else it is divided again. Nothing depends on the order in which
// threads run.
#pragma once

#include <cooperative_groups.h>

#include <cstdint>

namespace dsv4 {

constexpr int kLanes = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / kLanes;
constexpr int kBlocksPerSm = 2;
constexpr int kMaxCluster = 8;
constexpr int kMaxSelectK = 2048;
constexpr int kPerThread = 16;
constexpr uint32_t kChunk = kPerThread * kSelectThreads;
constexpr uint32_t kCapacity = kMaxSelectK + kChunk;  // candidates
constexpr int kBinBits = 10;
constexpr int kBins = 1 << kBinBits;

// Keys compare as unsigned integers in the order of the scores: absent ones, NaN, numbers.
constexpr uint32_t kAbsent = 0, kNaN = 1;

__device__ __forceinline__ uint32_t ScoreKey(float score) {
  uint32_t bits = __float_as_uint(score + 0.0f);  // one zero
  uint32_t key = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  return score == score ? key : kNaN;
}

__device__ __forceinline__ float ScoreOfKey(uint32_t key) {
  if (key == kNaN) return __uint_as_float(0x7fffffffu);
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// The larger the better: the key, and among equals the lower index.
using Candidate = uint64_t;

__device__ __forceinline__ Candidate MakeCandidate(uint32_t key, uint32_t index) {
  return uint64_t{key} << 32 | ~index;
}

struct Best {
  float* values;
  int32_t* indices;

  __device__ __forceinline__ void Store(uint32_t at, Candidate candidate) const {
    values[at] = ScoreOfKey(candidate >> 32);
    indices[at] = ~static_cast<uint32_t>(candidate);
  }
};

struct SelectShared {
  Candidate candidates[kCapacity];
  Candidate chosen[kMaxSelectK];
  Candidate members[kLanes];  // of one bin
  uint32_t counts[kBins];
  uint32_t num_members;
  uint32_t warp_sums[2][kSelectWarps], warp_extremes[kSelectWarps];
  uint32_t lowest[kMaxCluster], highest[kMaxCluster];  // keys of the blocks
};

// Candidates: none of the k best has a key below `lowest`, no key is above `highest`.
struct Kept {
  uint32_t count, lowest, highest;
};

__device__ __forceinline__ uint32_t WarpInclusiveSum(uint32_t x) {
  uint32_t lane = threadIdx.x % kLanes;
#pragma unroll
  for (uint32_t offset = 1; offset < kLanes; offset *= 2) {
    uint32_t below = __shfl_up_sync(kWholeWarp, x, offset);
    if (lane >= offset) x += below;
  }
  return x;
}

struct Sums {
  uint32_t before, total;
};

// Of the threads' numbers. Every other call may have the same `warp_sums`.
__device__ __forceinline__ Sums BlockSums(uint32_t mine, uint32_t* warp_sums) {
  uint32_t lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  uint32_t up_to = WarpInclusiveSum(mine);
  if (lane == kLanes - 1) warp_sums[warp] = up_to;
  __syncthreads();
  uint32_t other = lane < kSelectWarps ? warp_sums[lane] : 0;
  return {up_to - mine + __reduce_add_sync(kWholeWarp, lane < warp ? other : 0),
          __reduce_add_sync(kWholeWarp, other)};
}

__device__ __forceinline__ uint32_t BlockMax(uint32_t mine, uint32_t* warp_maxima) {
  mine = __reduce_max_sync(kWholeWarp, mine);
  if (threadIdx.x % kLanes == 0) warp_maxima[threadIdx.x / kLanes] = mine;
  __syncthreads();
  return __reduce_max_sync(kWholeWarp, warp_maxima[threadIdx.x % kSelectWarps]);
}

struct Bin {
  uint32_t bin, above, count;
};

// The bin in which the sum of counts from above reaches `needed`, and the sum above it. Every
// thread finds it; the block is synchronised once.
//   counts_at: the counts of a pair of bins.
template <typename CountsAt>
__device__ __forceinline__ Bin FindBin(CountsAt counts_at, uint32_t needed, uint32_t* warp_sums) {
  static_assert(kBins == 2 * kSelectThreads && kSelectWarps <= kLanes, "a lane sums two bins");
  uint32_t lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  uint2 pair = counts_at(threadIdx.x);
  uint32_t sum = __reduce_add_sync(kWholeWarp, pair.x + pair.y);
  if (lane == 0) warp_sums[warp] = sum;
  __syncthreads();

  uint32_t part = lane < kSelectWarps ? warp_sums[kSelectWarps - 1 - lane] : 0;
  uint32_t until = WarpInclusiveSum(part);
  int crossing = __ffs(__ballot_sync(kWholeWarp, until >= needed)) - 1;
  uint32_t above = __shfl_sync(kWholeWarp, until - part, crossing);

  uint32_t own = (kSelectWarps - 1 - crossing) * kLanes + kLanes - 1 - lane;
  pair = counts_at(own);
  until = above + WarpInclusiveSum(pair.x + pair.y);
  crossing = __ffs(__ballot_sync(kWholeWarp, until >= needed)) - 1;
  Bin found{2 * own + 1, until - pair.x - pair.y, pair.y};
  if (found.above + found.count < needed) found = {found.bin - 1, found.above + pair.y, pair.x};
  return {__shfl_sync(kWholeWarp, found.bin, crossing),
          __shfl_sync(kWholeWarp, found.above, crossing),
          __shfl_sync(kWholeWarp, found.count, crossing)};
}

// The needed-th of at most a warp's members.
__device__ __forceinline__ Candidate FindMember(const Candidate* members, int num_members,
                                                uint32_t needed) {
  int lane = threadIdx.x % kLanes;
  Candidate mine = lane < num_members ? members[lane] : 0;
  uint32_t rank = 1;
  for (int i = 0; i < num_members; ++i) rank += members[i] > mine;
  int last = __ffs(__ballot_sync(kWholeWarp, lane < num_members && rank == needed)) - 1;
  return __shfl_sync(kWholeWarp, mine, last);
}

// The needed-th best of the candidates, which are so many or more, or what is between it and the
// next.
__device__ __forceinline__ Candidate FindLeast(SelectShared& shared, const Kept& kept,
                                               uint32_t needed) {
  Candidate lowest = uint64_t{kept.lowest} << 32;
  int bits = 64 - __clz(kept.highest - kept.lowest);
  while (true) {
    for (int i = threadIdx.x; i < kBins; i += kSelectThreads) shared.counts[i] = 0;
    if (threadIdx.x == 0) shared.num_members = 0;
    __syncthreads();
    int shift = max(bits - kBinBits, 0);
    uint64_t num_bins = uint64_t{1} << (bits - shift);
    for (uint32_t i = threadIdx.x; i < kept.count; i += kSelectThreads) {
      Candidate candidate = shared.candidates[i];
      uint64_t bin = (candidate - lowest) >> shift;
      if (candidate >= lowest && bin < num_bins) atomicAdd(&shared.counts[bin], 1u);
    }
    __syncthreads();
    Bin found = FindBin(
        [&](uint32_t pair) { return uint2{shared.counts[2 * pair], shared.counts[2 * pair + 1]}; },
        needed, shared.warp_extremes);
    needed -= found.above;
    lowest += uint64_t{found.bin} << shift;
    bits = shift;
    if (found.count == needed) return lowest;
    if (found.count <= kLanes) break;
    __syncthreads();
  }
  for (uint32_t i = threadIdx.x; i < kept.count; i += kSelectThreads) {
    Candidate candidate = shared.candidates[i];
    if (candidate >= lowest && (candidate - lowest) >> bits == 0) {
      shared.members[atomicAdd(&shared.num_members, 1u)] = candidate;
    }
  }
  __syncthreads();
  return FindMember(shared.members, shared.num_members, needed);
}

// emit(position, candidate) for candidates from `least` on, except absent ones.
template <typename Emit>
__device__ __forceinline__ void EmitChosen(SelectShared& shared, uint32_t count, Candidate least,
                                           Emit emit) {
  uint32_t mine = 0;
  for (uint32_t i = threadIdx.x; i < count; i += kSelectThreads) {
    mine += shared.candidates[i] >= least;
  }
  uint32_t at = BlockSums(mine, shared.warp_sums[0]).before;
  for (uint32_t i = threadIdx.x; i < count; i += kSelectThreads) {
    Candidate candidate = shared.candidates[i];
    if (candidate >= least) emit(at++, candidate);
  }
}

// The k best of more candidates become all of them.
__device__ __forceinline__ void Prune(SelectShared& shared, uint32_t k, Kept& kept) {
  Candidate least = FindLeast(shared, kept, k);
  EmitChosen(shared, kept.count, least,
             [&](uint32_t at, Candidate candidate) { shared.chosen[at] = candidate; });
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < k; i += kSelectThreads) {
    shared.candidates[i] = shared.chosen[i];
  }
  kept.count = k;
  kept.lowest = least >> 32;
  __syncthreads();
}

// A thread's part of a chunk: every warp has consecutive elements.
struct Keys {
  uint32_t keys[kPerThread], first_index;

  __device__ __forceinline__ Candidate At(int i) const {
    return MakeCandidate(keys[i], first_index + i * kLanes);
  }

  __device__ __forceinline__ Keys(const float* row, uint32_t begin, uint32_t length) {
    uint32_t per_warp = (length + kSelectThreads - 1) / kSelectThreads * kLanes;
    uint32_t warp = threadIdx.x / kLanes, end = min((warp + 1) * per_warp, length);
    uint32_t first = warp * per_warp + threadIdx.x % kLanes;
    first_index = begin + first;
    float scores[kPerThread];
    // All loads are on their way together; predicates are too few for that.
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      scores[i] = __ldg(row + begin + min(first + i * kLanes, length - 1));
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      keys[i] = first + i * kLanes < end ? ScoreKey(scores[i]) : kAbsent;
    }
  }
};

// Of the thread's one to four groups of keys the least of their largest; of all threads' they are k
// or more.
__device__ __forceinline__ uint32_t LeastOfGroups(const Keys& x, uint32_t k) {
  constexpr int kMost = kMaxSelectK / kSelectThreads;
  static_assert(kMost == 4, "");
  uint32_t largest[kMost];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    largest[i % kMost] = i < kMost ? x.keys[i] : max(largest[i % kMost], x.keys[i]);
  }
  uint32_t least = min(min(largest[0], largest[1]), min(largest[2], largest[3]));
  if (k <= 2 * kSelectThreads) {
    least = min(max(largest[0], largest[1]), max(largest[2], largest[3]));
  }
  if (k <= kSelectThreads) {
    least = max(max(largest[0], largest[1]), max(largest[2], largest[3]));
    for (uint32_t size = 1; size < kLanes && 2 * size * k <= kSelectThreads; size *= 2) {
      least = max(least, __shfl_xor_sync(kWholeWarp, least, size));
    }
  }
  return least;
}

// The least of k or more groups' largest keys: so many of the chunk are not below it.
__device__ __forceinline__ uint32_t FirstLowest(const Keys& x, uint32_t k, uint32_t* warp_minima) {
  return max(~BlockMax(~LeastOfGroups(x, k), warp_minima), kNaN);
}

// Candidates from row[begin, end).
__device__ __forceinline__ Kept KeepCandidates(SelectShared& shared, const float* row,
                                               uint32_t begin, uint32_t end, uint32_t k) {
  Kept kept = {0, kNaN, kNaN};
  uint32_t lowest = kNaN, highest = kNaN;  // `highest` is of this thread
  bool turn = false;
#pragma unroll 1
  for (uint32_t chunk = begin; chunk < end; chunk += kChunk) {
    const Keys x(row, chunk, min(kChunk, end - chunk));
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) highest = max(highest, x.keys[i]);
    if (chunk == begin) {
      kept.lowest = lowest = FirstLowest(x, k, shared.warp_extremes);
    }
    bool stored;
    do {
      uint32_t passing = 0;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) passing += x.keys[i] >= lowest;
      Sums sums = BlockSums(passing, shared.warp_sums[turn]);
      turn = !turn;
      stored = kept.count + sums.total <= kCapacity;
      if (stored) {
        uint32_t at = kept.count + sums.before;
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
          if (x.keys[i] >= lowest) {
            shared.candidates[at++] = x.At(i);
          }
        }
        kept.count += sums.total;
      }
      // The first chunk gives a good bound for the others.
      if (!stored || (chunk == begin && end - chunk > kChunk && kept.count > k)) {
        kept.highest = BlockMax(highest, shared.warp_extremes);
        Prune(shared, k, kept);
        lowest = kept.lowest + 1;  // Of equals the earlier are chosen.
      }
    } while (!stored);
  }
  kept.highest = BlockMax(highest, shared.warp_extremes);
  return kept;
}

// The blocks' k best become the candidates of the first block.
__device__ __forceinline__ void GatherCandidates(const cooperative_groups::cluster_group& cluster,
                                                 SelectShared& shared, uint32_t k, Kept& kept) {
  const uint32_t rank = cluster.block_rank(), num_blocks = cluster.num_blocks();
  Candidate least = 1;
  if (kept.count > k) {
    if (rank == 0) {
      Prune(shared, k, kept);
    } else {
      least = FindLeast(shared, kept, k);
    }
  }
  cluster.sync();  // The first block's are in their place.
  SelectShared& first = *cluster.map_shared_rank(&shared, 0);
  Candidate* place = first.candidates + rank * k;
  if (rank != 0) {
    EmitChosen(shared, kept.count, least,
               [&](uint32_t at, Candidate candidate) { place[at] = candidate; });
  }
  for (uint32_t i = kept.count + threadIdx.x; i < k; i += kSelectThreads) place[i] = 0;
  if (threadIdx.x == 0) {
    first.lowest[rank] = kept.lowest;
    first.highest[rank] = kept.highest;
  }
  cluster.sync();
  if (rank != 0) return;
  kept.count = num_blocks * k;
  for (uint32_t i = 1; i < num_blocks; ++i) {
    // Each block with a lowest key has k from there on.
    kept.lowest = max(kept.lowest, shared.lowest[i]);
    kept.highest = max(kept.highest, shared.highest[i]);
  }
}

// The first `size` of x, a multiple of the threads, in descending order.
__device__ __forceinline__ void BitonicSort(Candidate* x, uint32_t size) {
  constexpr int kMost = kMaxSelectK / kSelectThreads;
  Candidate mine[kMost];
  auto for_mine = [&](auto use) {
#pragma unroll
    for (int m = 0; m < kMost; ++m) {
      uint32_t i = m * kSelectThreads + threadIdx.x;
      if (i < size) use(mine[m], i);
    }
  };
  for_mine([&](Candidate& a, uint32_t i) { a = x[i]; });
  for (uint32_t run = 2; run <= size; run *= 2) {
    for (uint32_t stride = run / 2; stride > 0; stride /= 2) {
      bool across_warps = stride >= kLanes;
      if (across_warps) {
        __syncthreads();
        for_mine([&](Candidate& a, uint32_t i) { x[i] = a; });
        __syncthreads();
      }
      for_mine([&](Candidate& a, uint32_t i) {
        Candidate b = across_warps ? x[i ^ stride] : __shfl_xor_sync(kWholeWarp, a, stride);
        bool takes_larger = ((i & stride) == 0) == ((i & run) == 0);
        if ((a < b) == takes_larger) a = b;
      });
    }
  }
  __syncthreads();
  for_mine([&](Candidate& a, uint32_t i) { x[i] = a; });
  __syncthreads();
}

template <bool kSorted>
__global__ void __launch_bounds__(kSelectThreads, kBlocksPerSm)
    SelectStreamedRows(const float* __restrict__ scores, const int32_t* __restrict__ lengths,
                       uint32_t n, uint32_t k, float* __restrict__ values,
                       int32_t* __restrict__ indices) {
  extern __shared__ __align__(16) unsigned char memory[];
  SelectShared& shared = *reinterpret_cast<SelectShared*>(memory);
  const auto cluster = cooperative_groups::this_cluster();
  uint32_t num_blocks = cluster.num_blocks(), rank = cluster.block_rank();
  const int64_t row = blockIdx.x / num_blocks;
  const uint32_t length =
      lengths == nullptr ? n : min(static_cast<uint32_t>(max(__ldg(lengths + row), 0)), n);
  if (length <= kChunk) {
    if (rank != 0) return;
    num_blocks = 1;
  }
  const Best best{values + row * k, indices + row * k};

  const uint32_t size = (length + num_blocks - 1) / num_blocks, begin = min(rank * size, length);
  Kept kept = KeepCandidates(shared, scores + row * n, begin, min(begin + size, length), k);
  if (num_blocks > 1) {
    GatherCandidates(cluster, shared, k, kept);
    if (rank != 0) return;
  }
  const Candidate least = length > k ? FindLeast(shared, kept, k) : 1;
  EmitChosen(shared, kept.count, least, [&](uint32_t at, Candidate candidate) {
    if (kSorted) {
      shared.chosen[at] = candidate;
    } else {
      best.Store(at, candidate);
    }
  });

  const uint32_t found = min(length, k);
  if (kSorted) {
    const uint32_t padded = max(2u << (31 - __clz((k - 1) | 1)), kSelectThreads);
    for (uint32_t i = found + threadIdx.x; i < padded; i += kSelectThreads) shared.chosen[i] = 0;
    __syncthreads();
    BitonicSort(shared.chosen, padded);
    for (uint32_t i = threadIdx.x; i < found; i += kSelectThreads) best.Store(i, shared.chosen[i]);
  }
  for (uint32_t i = found + threadIdx.x; i < k; i += kSelectThreads) {
    best.values[i] = -INFINITY;
    best.indices[i] = -1;
  }
}

}  // namespace dsv4
