// The kernels of sparse attention (sm_90a): 64 heads of a query over its slots, 64 at a time.
//
// One warpgroup fetches records, dequantises them and leaves tiles in shared memory; two others
// consume them. Blocks are persistent: the fetching runs ahead into their next item. An item is 64
// heads of a query and one split of its slots; two splits are combined by the two blocks of a
// cluster, more by a second kernel.
#pragma once

#include "attention_consumer.cuh"
#include "cluster.cuh"

namespace dsv4 {

constexpr int kProducerThreads = kWarpgroup;
constexpr int kAttentionThreads = kConsumerThreads + kProducerThreads;
constexpr int kStages = 2, kMaxParts = 256;
constexpr int kPartFloats = kTileRows * (kWidth / 2 + 2);

struct AttentionShared {
  uint8_t queries[kTileBytes];
  uint8_t entries[kStages][kTileBytes];
  Exchange exchange;
  float bias[kStages][kTileRows];  // 0, or -infinity for an empty slot
  float2 rotation[kRotary / 2];
  float2 stats[kTileRows];  // peaks and sums of the pair's other block
  uint64_t full[kStages], empty[kStages];
};

struct AttentionProblem {
  Attention a;
  SplitRule rule;
  int tiles, num_items;  // of 64 heads
  float* parts;          // [queries, tiles, splits] of bfloat16 [64, 512] and (peak, sum) [64, 2]
  uint16_t* o;

  DSV4_HOST_DEVICE bool in_pairs() const { return rule.max_splits == 2; }
  DSV4_HOST_DEVICE bool in_parts() const { return rule.max_splits > 2; }
};

struct AttentionItem {
  Query query;
  int tile, split;
  int begin, end;  // blocks of 64 slots

  __device__ AttentionItem(const AttentionProblem& p, int index) {
    const int splits = p.rule.max_splits;
    split = index % splits;
    tile = index / splits % p.tiles;
    query = QueryOf(p.a, index / splits / p.tiles);
    const int blocks = (query.num_slots + kTileRows - 1) / kTileRows;
    const int each = p.rule.BlocksPerSplit(blocks);
    begin = split * each;
    end = min(begin + each, blocks);
  }
};

// The blocks of this thread block's items, one after the other.
struct Walk {
  Query query;
  int index, block, end;

  // False after the last.
  __device__ __forceinline__ bool Next(const AttentionProblem& p) {
    ++block;
    while (block >= end) {
      index += gridDim.x;
      if (index >= p.num_items) return false;
      const AttentionItem item(p, index);
      query = item.query;
      block = item.begin;
      end = item.end;
    }
    return true;
  }
};

__device__ __forceinline__ const uint8_t* FromLane(const uint8_t* pointer, int lane) {
  return reinterpret_cast<const uint8_t*>(
      __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(pointer), lane));
}

// Four lanes load a record, a warp 8 at once. While the records of one block are decoded those of
// the next are on their way; for the blocks after that each lane searches one slot, a step a block.
__device__ void Produce(const AttentionProblem& p, AttentionShared& shared) {
  constexpr int kRowsAtOnce = 8, kRounds = kTileRows / (kProducerThreads / 32) / kRowsAtOnce;
  const int lane = threadIdx.x % 32, lane_of_four = lane % 4;
  const int first_row = (threadIdx.x - kConsumerThreads) / 32 * kRounds * kRowsAtOnce;
  Walk walk = {{}, static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x), 0, 0};
  RingPosition<kStages> stage;
  RecordPart parts[kRounds];
  bool seen[kRounds];
  Search slot = {}, block = {};
  Location found = {};
  bool more = true, has_slot = false, has_block = false, following = false;
  auto search = [&] {
    found = Found(p.a, block);
    following = has_block;
    block = slot;
    FindBlock(p.a, &block);
    has_block = has_slot;
    more = more && walk.Next(p);
    has_slot = more;
    if (more) {
      const int row = first_row + lane % (kRounds * kRowsAtOnce);
      slot = FindSlot(p.a, walk.query, walk.block * kTileRows + row);
    }
  };
  auto load = [&](int round) {
    const int holder = round * kRowsAtOnce + lane / 4;
    const Location at = {FromLane(found.body, holder), FromLane(found.scales, holder)};
    seen[round] = at.body != nullptr;
    parts[round].Load(at, lane_of_four);
  };
#pragma unroll 1
  for (int i = 0; i < 3; ++i) search();
  bool present = following;
  if (present) {
#pragma unroll
    for (int i = 0; i < kRounds; ++i) load(i);
  }
  search();
#pragma unroll 1
  while (present) {
    WaitBarrier(&shared.empty[stage.slot], stage.parity ^ 1);
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int row = first_row + i * kRowsAtOnce + lane / 4;
      parts[i].Store(shared.entries[stage.slot], row, lane_of_four);
      if (lane_of_four == 0) shared.bias[stage.slot][row] = seen[i] ? 0.0f : -INFINITY;
      if (following) load(i);
    }
    present = following;
    search();
    FenceAsync();
    Arrive(&shared.full[stage.slot]);
    stage.Advance();
  }
}

// To another block's shared memory; seen there after SyncCluster.
__device__ __forceinline__ void StoreToRank(uint32_t cluster_address, const float4& x) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(cluster_address),
               "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}
__device__ __forceinline__ void StoreToRank(uint32_t cluster_address, const float2& x) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(cluster_address), "f"(x.x),
               "f"(x.y)
               : "memory");
}

// Both blocks of a pair have a part; each finishes the channels of the consumer of its own rank.
__device__ __forceinline__ void FinishInPair(AttentionShared& shared, Consumer& state,
                                             int num_heads, const float* sink, uint16_t* o) {
  const int rank = blockIdx.x % 2;
  SyncCluster();  // nobody reads queries and entries any more
  if (Consumer::Number() != rank) {
    const uint32_t to = ClusterAddress(shared.queries, 1 - rank);
    state.ForEachPiece([&](int i, float4 x) {
      StoreToRank(to + (i * kWarpgroup + threadIdx.x % kWarpgroup) * sizeof(float4), x);
    });
    const uint32_t stats = ClusterAddress(shared.stats, 1 - rank);
    state.ForEachHead([&](int head, float2 x) { StoreToRank(stats + head * sizeof(x), x); });
  }
  SyncCluster();
  if (Consumer::Number() != rank) return;
  state.Add(reinterpret_cast<const float4*>(shared.queries), shared.stats);
  state.StoreOutput(o, shared.entries[0], state.Normalisers(sink, num_heads), num_heads,
                    shared.rotation);
}

__device__ void Consume(const AttentionProblem& p, AttentionShared& shared) {
  const float scale = p.a.scale * kLog2e;
  RingPosition<kStages> stage;
  Consumer state;
#pragma unroll 1
  for (int index = blockIdx.x; index < p.num_items; index += gridDim.x) {
    const AttentionItem item(p, index);
    if (item.begin >= item.end && p.in_parts()) continue;
    const int num_heads = min(p.a.heads - item.tile * kTileRows, kTileRows);
    const int64_t first =
        (int64_t{item.query.row} * p.a.heads + item.tile * kTileRows) * kWidth;
    SyncThreads(kConsumerBarrier, kConsumerThreads);  // nobody reads the queries before
    LoadQueries(shared.queries, static_cast<const uint16_t*>(p.a.q) + first, num_heads, threadIdx.x,
                kConsumerThreads);
    if (threadIdx.x < kRotary / 2) {
      shared.rotation[threadIdx.x] =
          Rotation(item.query.position, __ldg(p.a.frequencies + threadIdx.x));
    }
    FenceAsync();
    SyncThreads(kConsumerBarrier, kConsumerThreads);
    state.Reset();
#pragma unroll 1
    for (int block = item.begin; block < item.end; ++block) {
      WaitBarrier(&shared.full[stage.slot], stage.parity);
      state.Attend(shared.queries, shared.entries[stage.slot], shared.bias[stage.slot], scale,
                   shared.exchange);
      Arrive(&shared.empty[stage.slot]);
      stage.Advance();
    }
    state.SumOverEntries(shared.exchange);
    const float* sink = p.a.sink + item.tile * kTileRows;
    if (p.in_pairs()) {
      FinishInPair(shared, state, num_heads, sink, p.o + first);
    } else if (p.in_parts()) {  // nobody reads the queries any more
      float* part = p.parts + int64_t{index} * kPartFloats;
      if (Consumer::Number() == 0) {
        auto* stats = reinterpret_cast<float2*>(part + kTileRows * kWidth / 2);
        state.ForEachHead([&](int head, float2 x) { stats[head] = x; });
      }
      state.StoreOutput(reinterpret_cast<uint16_t*>(part), shared.queries, state.Means(),
                        kTileRows, nullptr);
    } else {
      state.StoreOutput(p.o + first, shared.queries, state.Normalisers(sink, num_heads), num_heads,
                        shared.rotation);
    }
  }
}

__global__ void __launch_bounds__(kAttentionThreads, 1)
    Attend(const __grid_constant__ AttentionProblem p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<AttentionShared*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      InitBarrier(&shared.full[i], kProducerThreads);
      InitBarrier(&shared.empty[i], kConsumerThreads);
    }
    FenceBarrierInit();
  }
  __syncthreads();
  asm volatile("griddepcontrol.launch_dependents;");
  if (threadIdx.x < kConsumerThreads) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 184;");
    Consume(p, shared);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 136;");
    Produce(p, shared);
    if (p.in_pairs()) {  // with the consumers' two
      SyncCluster();
      SyncCluster();
    }
  }
}

// One block per query and head. Groups of 128 threads take splits in turn, 4 channels a thread.
template <int kGroups>
__global__ void __launch_bounds__(kGroups * kWarpgroup, 1024 / (kGroups * kWarpgroup))
    Combine(const __grid_constant__ AttentionProblem p) {
  __shared__ float4 sums[kGroups][kWarpgroup];
  const Query query = QueryOf(p.a, blockIdx.x);
  const int head = blockIdx.y, splits = p.rule.max_splits;
  const int blocks = (query.num_slots + kTileRows - 1) / kTileRows;
  const int each = p.rule.BlocksPerSplit(blocks);
  const int used = (blocks + each - 1) / each;
  const float* part =
      p.parts + (int64_t{query.row} * p.tiles + head / kTileRows) * splits * kPartFloats;
  const int row = head % kTileRows, lane = threadIdx.x % 32;
  asm volatile("griddepcontrol.wait;" ::: "memory");
  auto stats = [&](int split) {
    return reinterpret_cast<const float2*>(part + split * int64_t{kPartFloats} +
                                           kTileRows * kWidth / 2)[row];
  };
  float peak = -INFINITY, sum = 0.0f;
  for (int i = lane; i < used; i += 32) peak = fmaxf(peak, stats(i).x);
  for (int i = 16; i > 0; i /= 2) peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, i));
  auto weight = [&](float2 x) { return x.y * Exp2(x.x - Base(peak)); };
  for (int i = lane; i < used; i += 32) sum += weight(stats(i));
  for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(kAllLanes, sum, i);

  const int group = threadIdx.x / kWarpgroup, thread = threadIdx.x % kWarpgroup;
  float4 o = {};
#pragma unroll 8
  for (int i = group; i < used; i += kGroups) {
    const float factor = weight(stats(i));
    const uint2 x = reinterpret_cast<const uint2*>(part + i * int64_t{kPartFloats} +
                                                   row * kWidth / 2)[thread];
    o.x = fmaf(factor, __uint_as_float(x.x << 16), o.x);
    o.y = fmaf(factor, __uint_as_float(x.x & 0xffff0000u), o.y);
    o.z = fmaf(factor, __uint_as_float(x.y << 16), o.z);
    o.w = fmaf(factor, __uint_as_float(x.y & 0xffff0000u), o.w);
  }
  sums[group][thread] = o;
  __syncthreads();
  if (group > 0) return;
  for (int i = 1; i < kGroups; ++i) {
    const float4 x = sums[i][thread];
    o.x += x.x;
    o.y += x.y;
    o.z += x.z;
    o.w += x.w;
  }
  const float normaliser = Normaliser(sum, peak, __ldg(p.a.sink + head));
  float2 pairs[2] = {{o.x * normaliser, o.y * normaliser}, {o.z * normaliser, o.w * normaliser}};
  const int turn = 4 * thread - (kWidth - kRotary);
  if (turn >= 0) {
    for (int i = 0; i < 2; ++i) {
      const float frequency = __ldg(p.a.frequencies + turn / 2 + i);
      pairs[i] = RotateBack(pairs[i], Rotation(query.position, frequency));
    }
  }
  uint2* out = reinterpret_cast<uint2*>(p.o + (int64_t{query.row} * p.a.heads + head) * kWidth);
  out[thread] = {PackBf16x2(pairs[0].x, pairs[0].y), PackBf16x2(pairs[1].x, pairs[1].y)};
}

}  // namespace dsv4
