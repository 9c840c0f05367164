// Radix selection of a row's k largest scores by a cluster of thread blocks that hold the row in
// registers: for few rows, where the blocks' work between exchanges is short.
//
// A row is cut into one contiguous segment per warp, so that ranks in the order of indices are
// prefix sums over warps. A first digit, counted in shared memory, leaves few candidates, which
// move to shared memory; two more digits give the k-th largest key exactly. A digit whose bin is
// chosen whole ends the search. Candidates that are too many stay where they are: slower, not less
// exact. Nothing depends on the order in which threads run.
#pragma once

#include "topk.cuh"

namespace dsv4::resident {

constexpr int kDigits = 3;
constexpr int kBins = 2048;

// The first bit of a digit, 11 + 11 + 10 bits from above.
__device__ __forceinline__ constexpr int DigitShift(int digit) {
  return digit < 0 ? 32 : digit == 0 ? 21 : digit == 1 ? 10 : 0;
}

struct Tally {
  uint32_t above, equal;
};

// What is chosen: keys above `key`, and the first `num_equal` of those equal to it.
struct Threshold {
  uint32_t key, num_equal;
};

// The blocks that share a row: the cluster, or one block alone.
struct Team {
  cooperative_groups::cluster_group cluster;
  unsigned num_blocks, rank;

  __device__ __forceinline__ bool Alone() const { return num_blocks == 1; }

  __device__ __forceinline__ void Sync() const {
    if (Alone()) {
      __syncthreads();
    } else {
      cluster.sync();
    }
  }
};

struct SelectShared {
  // The counts of the digits; then, where results are sorted, the chosen.
  uint32_t total[kDigits][kBins];
  uint32_t local[kBins];  // of this block, in a cluster
  uint32_t warp_sums[kSelectWarps];
  Tally warps[kSelectWarps];
  Tally blocks[kMaxCluster];
};

// A warp's part of `length` elements: from `first` to `end`, in steps of a warp.
struct Part {
  uint32_t first, end;
  int num_steps;

  __device__ __forceinline__ Part(uint32_t length, uint32_t part, uint32_t num_parts) {
    uint32_t size = (length + num_parts * kLanes - 1) / (num_parts * kLanes) * kLanes;
    first = min(part * size, length);
    end = min(first + size, length);
    num_steps = (end - first + kLanes - 1) / kLanes;
  }

  __device__ __forceinline__ uint32_t At(int step) const {
    return first + step * kLanes + threadIdx.x % kLanes;
  }
};

// A warp's elements of a row.
template <int kResident>
struct Segment : Part {
  const float* row;
  uint32_t keys[kResident];

  __device__ __forceinline__ Segment(const float* scores, const Part& part)
      : Part(part), row(scores) {
#pragma unroll
    for (int step = 0; step < kResident; ++step) keys[step] = Load(step);
  }

  __device__ __forceinline__ uint32_t Load(int step) const {
    return At(step) < end ? ScoreKey(__ldg(row + At(step))) : kAbsent;
  }

  // use(step, key), for all lanes together.
  template <typename Use>
  __device__ __forceinline__ void ForEach(Use use) const {
#pragma unroll
    for (int step = 0; step < kResident; ++step) {
      if (step < num_steps) use(step, keys[step]);
    }
#pragma unroll 1
    for (int step = kResident; step < num_steps; ++step) use(step, Load(step));
  }

  __device__ __forceinline__ uint32_t IndexOf(int step) const { return At(step); }
};

// A warp's candidates, in the order of their indices.
struct Candidates : Part {
  const uint32_t* keys;
  const uint32_t* indices;

  __device__ __forceinline__ Candidates(const uint32_t* keys, const uint32_t* indices,
                                        const Part& part)
      : Part(part), keys(keys), indices(indices) {}

  template <typename Use>
  __device__ __forceinline__ void ForEach(Use use) const {
#pragma unroll 1
    for (int step = 0; step < num_steps; ++step) {
      use(step, At(step) < end ? keys[At(step)] : kAbsent);
    }
  }

  __device__ __forceinline__ uint32_t IndexOf(int step) const { return indices[At(step)]; }
};

struct Bin {
  uint32_t bin, above, count;
};

// The bin in which the sum of counts from above reaches `needed`, and the sum above it. Every
// thread finds it; the block is synchronised once.
__device__ __forceinline__ Bin FindBin(const uint32_t* counts, uint32_t needed,
                                       uint32_t* warp_sums) {
  constexpr int kPerWarp = kBins / kSelectWarps;
  static_assert(kPerWarp == 4 * kLanes && kSelectWarps <= kLanes, "a lane sums four bins");
  int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const uint4* fours = reinterpret_cast<const uint4*>(counts);
  uint4 four = fours[warp * kLanes + lane];
  uint32_t sum = __reduce_add_sync(kWholeWarp, four.x + four.y + four.z + four.w);
  if (lane == 0) warp_sums[warp] = sum;
  __syncthreads();

  uint32_t part = lane < kSelectWarps ? warp_sums[kSelectWarps - 1 - lane] : 0;
  uint32_t until = WarpInclusiveSum(part);
  int crossing = __ffs(__ballot_sync(kWholeWarp, until >= needed)) - 1;
  uint32_t above = __shfl_sync(kWholeWarp, until - part, crossing);

  int own = (kSelectWarps - 1 - crossing) * kLanes + kLanes - 1 - lane;
  four = fours[own];
  sum = four.x + four.y + four.z + four.w;
  until = above + WarpInclusiveSum(sum);
  crossing = __ffs(__ballot_sync(kWholeWarp, until >= needed)) - 1;
  Bin found{static_cast<uint32_t>(4 * own + 3), until - sum, four.w};
  if (found.above + found.count < needed) found = {found.bin - 1, found.above + four.w, four.z};
  if (found.above + found.count < needed) found = {found.bin - 1, found.above + four.z, four.y};
  if (found.above + found.count < needed) found = {found.bin - 1, found.above + four.y, four.x};
  return {__shfl_sync(kWholeWarp, found.bin, crossing),
          __shfl_sync(kWholeWarp, found.above, crossing),
          __shfl_sync(kWholeWarp, found.count, crossing)};
}

// Adds the block's counts to the totals of every block of the cluster, and clears them.
__device__ __forceinline__ void ShareCounts(const Team& team, uint32_t* local, uint32_t* total) {
#pragma unroll 1
  for (int bin = threadIdx.x; bin < kBins; bin += kSelectThreads) {
    uint32_t count = local[bin];
    if (count == 0) continue;
    local[bin] = 0;
    for (unsigned rank = 0; rank < team.num_blocks; ++rank) {
      atomicAdd(team.cluster.map_shared_rank(total, rank) + bin, count);
    }
  }
}

// Counts a digit of the keys that begin with `prefix` and finds the bin of the needed-th largest.
template <int kDigit, typename Source>
__device__ __forceinline__ Bin FindDigit(const Team& team, const Source& source, uint32_t prefix,
                                         uint32_t needed, SelectShared& shared) {
  constexpr int kShift = DigitShift(kDigit), kAbove = DigitShift(kDigit - 1);
  constexpr uint32_t kMask = (1u << (kAbove - kShift)) - 1;
  uint32_t* counts = team.Alone() ? shared.total[kDigit] : shared.local;
  source.ForEach([&](int, uint32_t key) {
    if (kDigit == 0 || key >> (kAbove % 32) == prefix) {
      atomicAdd(counts + (key >> kShift & kMask), 1u);
    }
  });
  __syncthreads();
  if (!team.Alone()) {
    ShareCounts(team, shared.local, shared.total[kDigit]);
    team.Sync();
  }
  return FindBin(shared.total[kDigit], needed, shared.warp_sums);
}

// The exact threshold within the first digit's bin, of which `needed` keys are chosen.
template <typename Source>
__device__ __forceinline__ Threshold Refine(const Team& team, const Source& source, Bin first,
                                            uint32_t needed, SelectShared& shared) {
  uint32_t prefix = first.bin;
  if (first.count == needed) return {max(prefix << DigitShift(0), kNaN), needed};
  Bin found = FindDigit<1>(team, source, prefix, needed, shared);
  prefix = prefix << (DigitShift(0) - DigitShift(1)) | found.bin;
  needed -= found.above;
  if (found.count == needed) return {max(prefix << DigitShift(1), kNaN), needed};
  found = FindDigit<2>(team, source, prefix, needed, shared);
  return {prefix << (DigitShift(1) - DigitShift(2)) | found.bin, needed - found.above};
}

// The sum of the warps' numbers before this one's, and of all of the block's.
__device__ __forceinline__ uint2 BlockPrefix(uint32_t mine, SelectShared& shared) {
  int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  if (lane == 0) shared.warp_sums[warp] = mine;
  __syncthreads();
  uint32_t other = lane < kSelectWarps ? shared.warp_sums[lane] : 0;
  return {__reduce_add_sync(kWholeWarp, lane < warp ? other : 0),
          __reduce_add_sync(kWholeWarp, other)};
}

// Moves the keys from `lowest` on, if they are no more than `capacity`; returns how many they are.
template <typename Source>
__device__ __forceinline__ uint32_t MoveCandidates(const Source& source, uint32_t lowest,
                                                   uint32_t capacity, uint32_t* keys,
                                                   uint32_t* indices, SelectShared& shared) {
  uint32_t count = 0, lower_lanes = (1u << threadIdx.x % kLanes) - 1;
  source.ForEach([&](int, uint32_t key) { count += key >= lowest; });
  __syncthreads();  // FindBin has read warp_sums
  uint2 prefix = BlockPrefix(__reduce_add_sync(kWholeWarp, count), shared);
  uint32_t at = prefix.x, total = prefix.y;
  if (total > capacity) return total;
  source.ForEach([&](int step, uint32_t key) {
    uint32_t kept = __ballot_sync(kWholeWarp, key >= lowest);
    if (kept == 0) return;
    if (key >= lowest) {
      keys[at + __popc(kept & lower_lanes)] = key;
      indices[at + __popc(kept & lower_lanes)] = source.IndexOf(step);
    }
    at += __popc(kept);
  });
  __syncthreads();
  return total;
}

// How many keys above the threshold and equal to it come before the warp's.
__device__ __forceinline__ Tally Before(const Team& team, Tally mine, SelectShared& shared) {
  unsigned lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  if (lane == 0) shared.warps[warp] = mine;
  __syncthreads();
  Tally other = lane < kSelectWarps ? shared.warps[lane] : Tally{0, 0};
  uint32_t earlier = lane < warp ? kWholeWarp : 0;
  Tally before{__reduce_add_sync(kWholeWarp, other.above & earlier),
               __reduce_add_sync(kWholeWarp, other.equal & earlier)};
  if (team.Alone()) return before;
  Tally block{__reduce_add_sync(kWholeWarp, other.above),
              __reduce_add_sync(kWholeWarp, other.equal)};
  if (warp == 0 && lane < team.num_blocks) {
    team.cluster.map_shared_rank(shared.blocks, lane)[team.rank] = block;
  }
  team.Sync();
  Tally theirs = lane < team.rank ? shared.blocks[lane] : Tally{0, 0};
  before.above += __reduce_add_sync(kWholeWarp, theirs.above);
  before.equal += __reduce_add_sync(kWholeWarp, theirs.equal);
  return before;
}

// emit(position, key, index) for what the block chooses, positions in the order of indices.
template <typename Source, typename Emit>
__device__ __forceinline__ void EmitChosen(const Team& team, const Source& source,
                                           Threshold threshold, SelectShared& shared, Emit emit) {
  Tally mine{0, 0};
  source.ForEach([&](int, uint32_t key) {
    mine.above += key > threshold.key;
    mine.equal += key == threshold.key;
  });
  mine = {__reduce_add_sync(kWholeWarp, mine.above), __reduce_add_sync(kWholeWarp, mine.equal)};
  Tally before = Before(team, mine, shared);
  uint32_t lower_lanes = (1u << threadIdx.x % kLanes) - 1;
  source.ForEach([&](int step, uint32_t key) {
    uint32_t above = __ballot_sync(kWholeWarp, key > threshold.key);
    uint32_t equal = __ballot_sync(kWholeWarp, key == threshold.key);
    if ((above | equal) == 0) return;
    uint32_t num_above = before.above + __popc(above & lower_lanes);
    uint32_t num_equal = before.equal + __popc(equal & lower_lanes);
    if (key > threshold.key || (key == threshold.key && num_equal < threshold.num_equal)) {
      emit(num_above + min(num_equal, threshold.num_equal), key, source.IndexOf(step));
    }
    before.above += __popc(above);
    before.equal += __popc(equal);
  });
}

template <int kResident>
constexpr uint32_t kCandidateCapacity = kResident <= 16 ? 4096 : 16384;

template <int kResident, bool kSorted>
__global__ void __launch_bounds__(kSelectThreads)
    SelectResidentRows(const float* __restrict__ scores, const int32_t* __restrict__ lengths,
                       uint32_t n, uint32_t k, float* __restrict__ values,
                       int32_t* __restrict__ indices) {
  __shared__ __align__(16) SelectShared shared;
  extern __shared__ uint32_t candidate_keys[];
  constexpr uint32_t kCapacity = kCandidateCapacity<kResident>;
  uint32_t* candidate_indices = candidate_keys + kCapacity;
  const auto cluster = cooperative_groups::this_cluster();
  Team team{cluster, cluster.num_blocks(), cluster.block_rank()};
  const int64_t row = blockIdx.x / team.num_blocks;
  const uint32_t length =
      lengths == nullptr ? n : min(static_cast<uint32_t>(max(__ldg(lengths + row), 0)), n);
  if (length <= kChunk) {  // One block selects alone.
    if (team.rank != 0) return;
    team.num_blocks = 1;
  }
  const unsigned warp = threadIdx.x / kLanes;
  const Segment<kResident> segment(
      scores + row * n,
      Part(length, team.rank * kSelectWarps + warp, team.num_blocks * kSelectWarps));
  values += row * k;
  indices += row * k;

  for (int i = threadIdx.x; i < kBins; i += kSelectThreads) {
    for (int digit = 0; digit < kDigits; ++digit) shared.total[digit][i] = 0;
    shared.local[i] = 0;
  }
  team.Sync();

  const bool choosy = length > k;
  Bin first{0, 0, 0};
  if (choosy) first = FindDigit<0>(team, segment, 0, k, shared);
  const uint32_t lowest = max(first.bin << DigitShift(0), kNaN);
  const uint32_t num_candidates =
      MoveCandidates(segment, lowest, kCapacity, candidate_keys, candidate_indices, shared);

  // The larger key first; among equals the lower index.
  static_assert(sizeof(uint64_t) * kMaxSelectK <= sizeof(shared.total));
  uint64_t* chosen = reinterpret_cast<uint64_t*>(shared.total);
  uint64_t* gathered = team.Alone() ? chosen : cluster.map_shared_rank(chosen, 0);
  auto select_from = [&](const auto& source) {
    Threshold threshold{kAbsent, 0};  // all
    if (choosy) threshold = Refine(team, source, first, k - first.above, shared);
    EmitChosen(team, source, threshold, shared, [&](uint32_t at, uint32_t key, uint32_t index) {
      if (kSorted) {
        gathered[at] = uint64_t{key} << 32 | ~index;
      } else {
        values[at] = ScoreOfKey(key);
        indices[at] = index;
      }
    });
  };
  if (num_candidates <= kCapacity) {
    select_from(Candidates(candidate_keys, candidate_indices,
                           Part(num_candidates, warp, kSelectWarps)));
  } else {
    select_from(segment);
  }

  if (!kSorted) {
    for (uint32_t i = length + team.rank * kSelectThreads + threadIdx.x; i < k;
         i += team.num_blocks * kSelectThreads) {
      values[i] = -INFINITY;
      indices[i] = -1;
    }
    return;
  }
  const uint32_t padded_k = max(2u << (31 - __clz((k - 1) | 1)), kSelectThreads);
  for (uint32_t i = min(length, k) + threadIdx.x; i < padded_k; i += kSelectThreads) chosen[i] = 0;
  team.Sync();
  if (team.rank != 0) return;
  BitonicSort(chosen, padded_k);
  for (uint32_t i = threadIdx.x; i < k; i += kSelectThreads) {
    uint64_t best = chosen[i];
    values[i] = best == 0 ? -INFINITY : ScoreOfKey(best >> 32);
    indices[i] = best == 0 ? -1 : static_cast<int32_t>(~static_cast<uint32_t>(best));
  }
}

}  // namespace dsv4::resident
