// Sparse attention of few queries (sm_90a): the blocks of a cluster share the slots of a query, for
// 8 or 16 of its heads.
//
// Two warps share 64 channels. Each fetches these of half of a chunk's records, decodes them in
// place as an operand of the logits' product, and leaves them in shared memory for the other
// product, in which each accumulates half of the channels over the whole chunk. In the end every
// block finishes some of the channels: all blocks send it their parts of them.
#pragma once

#include "attention_softmax.cuh"
#include "attention_tiles.cuh"
#include "cluster.cuh"

namespace dsv4 {

constexpr int kPairs = kPanels, kClusterWarps = 2 * kPairs, kClusterThreads = kClusterWarps * 32;
constexpr int kChunk = 32;    // slots at once
constexpr int kSlots = 1024;  // whose records are searched at once
constexpr int kLogUnits = 5, kUnits = 1 << kLogUnits;  // of 16 channels
constexpr int kLogMaxRanks = 3, kMaxRanks = 1 << kLogMaxRanks;

struct ClusterProblem {
  Attention a;
  int log_ranks;  // blocks of a cluster
  uint16_t* o;
};

template <int kHeads>
struct ClusterShared {
  uint8_t values[kPairs][kChunk * 128];    // parts of 16 bytes swizzled by the row's number
  float4 parts[kUnits * kHeads / 8 * 32];  // [rank, own unit, 8 heads, lane]
  Location records[kSlots];
  float bias[kSlots];  // 0, or -infinity for an empty slot
  float logits[kPairs][kHeads][kChunk + 4];
  uint16_t weights[kHeads][kChunk + 8];
  float factors[kHeads];
  float2 stats[kMaxRanks][kHeads];  // peaks and sums
  float shares[kMaxRanks][kHeads];
  float2 rotation[kRotary / 2];
  uint64_t told, arrived;  // stats and parts of all ranks
};

// The record of an empty slot.
__device__ const uint4 kNothing[(kWidth + kRotary) / 16] = {};

__device__ __forceinline__ void LoadMatrices(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(SharedAddress(row))
               : "memory");
}
__device__ __forceinline__ void LoadTransposed(uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(SharedAddress(row))
               : "memory");
}

// 16 channels of one record: codes in the first half, or numbers.
struct RecordSlice {
  uint4 x[2];

  __device__ __forceinline__ void Decode(uint32_t scale_byte) {
    const uint4 codes = x[0];
    x[0] = DecodeCodes(codes.x, codes.y, scale_byte);
    x[1] = DecodeCodes(codes.z, codes.w, scale_byte);
  }

  __device__ __forceinline__ uint32_t Word(int i) const { return (&x[0].x)[i]; }
};

// Searches the records of the slots from `first` on, and fills up the last chunk.
__device__ __forceinline__ void FindRecords(const Attention& a, const Query& query, int first,
                                            int count, Location* records, float* bias) {
#pragma unroll 1
  for (int i = threadIdx.x; i < (count + kChunk - 1) / kChunk * kChunk; i += kClusterThreads) {
    Location at = {};
    if (i < count) {
      Search slot = FindSlot(a, query, first + i);
      FindBlock(a, &slot);
      at = Found(a, slot);
    }
    const bool empty = at.body == nullptr;
    const auto* nothing = reinterpret_cast<const uint8_t*>(kNothing);
    records[i] = empty ? Location{nothing, nothing} : at;
    bias[i] = empty ? -INFINITY : 0.0f;
  }
}

// A head's peak and sum over all ranks, from each lane's; returns the lane's share in the output.
__device__ __forceinline__ float ShareOfRank(float2 stats, float sink) {
  float peak = stats.x;
#pragma unroll
  for (int i = kMaxRanks / 2; i > 0; i /= 2) {
    peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, i));
  }
  const float factor = Exp2(stats.x - Base(peak));
  float sum = stats.y * factor;
#pragma unroll
  for (int i = kMaxRanks / 2; i > 0; i /= 2) sum += __shfl_xor_sync(kAllLanes, sum, i);
  return factor * Normaliser(sum, peak, sink);
}

// Block (rank of a cluster of a sequence, heads, token).
template <int kHeads>
__global__ void __launch_bounds__(kClusterThreads, 1)
    AttendInCluster(const __grid_constant__ ClusterProblem p) {
  constexpr int kTiles = kHeads / 8;
  constexpr int kRows = kChunk / 2, kRounds = kRows / 8;  // of a warp's records
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<ClusterShared<kHeads>*>(memory);
  const Attention& a = p.a;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int pair = warp % kPairs, half = warp / kPairs;
  const int row = lane / 4, lane_of_four = lane % 4;  // in products
  const int ranks = 1 << p.log_ranks, rank = blockIdx.x & (ranks - 1);
  const int first_head = blockIdx.y * kHeads;
  const bool rotary = pair == kPairs - 1;
  if (threadIdx.x == 0) {
    InitBarrier(&shared.told, 1);
    InitBarrier(&shared.arrived, 1);
    FenceBarrierInit();
    ArriveExpectingBytes(&shared.told, ranks * kHeads * sizeof(float2));
    ArriveExpectingBytes(&shared.arrived, sizeof(shared.parts));
  }
  __syncwarp();
  ArriveAtCluster();

  const Query query = QueryOf(a, blockIdx.x >> p.log_ranks, blockIdx.z);
  const int64_t first_row = int64_t{query.row} * a.heads + first_head;
  // Heads are the columns of both products, in which a warp's lanes share the channels as in the
  // records: 16 that follow each other.
  uint32_t q[kTiles][8];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const auto* from = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(a.q) +
                                                      (first_row + 8 * n + row) * kWidth +
                                                      pair * 64 + lane_of_four * 16);
    uint4 x[2] = {};
    if (first_head + 8 * n + row < a.heads) {
      x[0] = __ldg(from);
      x[1] = __ldg(from + 1);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) q[n][i] = (&x[0].x)[i];
  }
  const int own_head = first_head + warp;
  const float sink = warp < kHeads && own_head < a.heads ? __ldg(a.sink + own_head) : 0.0f;
  if (rank == ranks - 1 && warp == kClusterWarps - 1) {
    shared.rotation[lane] = Rotation(query.position, __ldg(a.frequencies + lane));
  }

  const float scale = a.scale * kLog2e;
  uint8_t* values = shared.values[pair];
  float o[2][kTiles][4] = {};
  float peak = -INFINITY, sum = 0.0f;  // of head `warp`, the sum of the lane's slots
  const int each = (query.num_slots + ranks - 1) >> p.log_ranks;
  const int begin = rank * each, end = min(begin + each, query.num_slots);
#pragma unroll 1
  for (int first = begin; first < end; first += kSlots) {
    const int count = min(end - first, kSlots);
    if (first > begin) __syncthreads();  // nobody needs the slots of before
    FindRecords(a, query, first, count, shared.records, shared.bias);
    __syncthreads();

    RecordSlice records[kRounds];
    uint32_t scale_bytes[kRounds];
    auto load = [&](int chunk) {
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        const Location& at = shared.records[chunk + half * kRows + 8 * i + row];
        const auto* from =
            reinterpret_cast<const uint4*>(at.body + pair * 64) + lane_of_four * (rotary ? 2 : 1);
        records[i].x[0] = __ldg(from);
        if (rotary) records[i].x[1] = __ldg(from + 1);
        scale_bytes[i] = __ldg(at.scales + pair);
      }
    };
    load(0);
#pragma unroll 1
    for (int chunk = 0; chunk < count; chunk += kChunk) {
      SyncThreads(1 + pair, 64);  // both have read the values of before
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        if (!rotary) records[i].Decode(scale_bytes[i]);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          *reinterpret_cast<uint4*>(values + (half * kRows + 8 * i + row) * 128 +
                                    ((2 * lane_of_four + j) ^ row) * 16) = records[i].x[j];
        }
      }
      float s[kTiles][4] = {};
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const Fragment x = {{records[0].Word(2 * step), records[1].Word(2 * step),
                             records[0].Word(2 * step + 1), records[1].Word(2 * step + 1)}};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) Multiply(s[n], x, q[n][2 * step], q[n][2 * step + 1]);
      }
      if (chunk + kChunk < count) load(chunk + kChunk);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          shared.logits[pair][8 * n + 2 * lane_of_four + i % 2][half * kRows + i / 2 * 8 + row] =
              s[n][i];
        }
      }
      __syncthreads();
      if (warp < kHeads) {
        float x = 0.0f;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) x += shared.logits[i][warp][lane];
        x = fmaf(x, scale, shared.bias[chunk + lane]);
        float highest = fmaxf(peak, x);
#pragma unroll
        for (int i = 16; i > 0; i /= 2) {
          highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, i));
        }
        const float factor = Exp2(peak - Base(highest)), weight = Exp2(x - Base(highest));
        peak = highest;
        sum = sum * factor + weight;
        shared.weights[warp][lane] = static_cast<uint16_t>(PackBf16x2(weight, 0.0f));
        if (lane == 0) shared.factors[warp] = factor;
      }
      __syncthreads();
      uint32_t weights[kTiles][4];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        LoadMatrices(weights[n], &shared.weights[8 * n + lane % 8][lane / 8 * 8]);
        const float2 factor =
            *reinterpret_cast<const float2*>(&shared.factors[8 * n + 2 * lane_of_four]);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          o[m][n][0] *= factor.x;
          o[m][n][1] *= factor.y;
          o[m][n][2] *= factor.x;
          o[m][n][3] *= factor.y;
        }
      }
#pragma unroll
      for (int step = 0; step < kChunk / 16; ++step) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          Fragment x;
          LoadTransposed(x.x, values + (step * 16 + lane / 16 * 8 + lane % 8) * 128 +
                                  ((4 * half + 2 * m + lane / 8 % 2) ^ (lane % 8)) * 16);
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            Multiply(o[m][n], x, weights[n][2 * step], weights[n][2 * step + 1]);
          }
        }
      }
    }
  }

  WaitForCluster();  // every block's barriers are ready
  if (warp < kHeads) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(kAllLanes, sum, i);
    if (lane < ranks) {
      StoreInCluster(ClusterAddress(&shared.stats[rank][warp], lane),
                     ClusterAddress(&shared.told, lane), peak, sum);
    }
  }
  const int log_units = kLogUnits - p.log_ranks;  // that a block finishes
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const int unit = pair * 4 + half * 2 + m, to = unit >> log_units;
    const int index = (rank << log_units | (unit & ((1 << log_units) - 1))) * kTiles * 32 + lane;
    const uint32_t barrier = ClusterAddress(&shared.arrived, to);
    const uint32_t at = ClusterAddress(&shared.parts[index], to);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      StoreInCluster(at + n * 32 * sizeof(float4), barrier, o[m][n][0], o[m][n][1], o[m][n][2],
                     o[m][n][3]);
    }
  }
  if (warp < kHeads) {
    WaitBarrierOfCluster(&shared.told, 0);
    const float share =
        ShareOfRank(lane < ranks ? shared.stats[lane][warp] : float2{-INFINITY, 0.0f}, sink);
    if (lane < ranks) shared.shares[lane][warp] = share;
  }
  __syncthreads();
  WaitBarrierOfCluster(&shared.arrived, 0);

  // A thread adds up pieces of one channel of two heads; neighbours exchange, so that each has two
  // channels that follow each other of one head.
  constexpr int kChannelsAtOnce = kClusterThreads / 64 / kTiles * 16;
  const auto* pieces = reinterpret_cast<const float2*>(shared.parts) + threadIdx.x;
  const int num_pieces = kTiles * 64 << log_units;
  const int head = threadIdx.x / 64 % kTiles * 8 + threadIdx.x / 2 % 4 * 2;
  const int odd = threadIdx.x / 8 % 2;
  const bool exists = first_head + head + odd < a.heads;
  uint16_t* out = p.o + (first_row + head + odd) * kWidth;
  int channel = 16 * ((rank << log_units) + threadIdx.x / 64 / kTiles) + threadIdx.x % 2 * 8 +
                threadIdx.x / 16 % 4 * 2;
#pragma unroll 1
  for (int i = threadIdx.x; i < num_pieces; i += kClusterThreads) {
    float2 x = {};
#pragma unroll 2
    for (int r = 0; r < ranks; ++r) {
      const float2 share = *reinterpret_cast<const float2*>(&shared.shares[r][head]);
      const float2 piece = pieces[r * num_pieces];
      x.x = fmaf(piece.x, share.x, x.x);
      x.y = fmaf(piece.y, share.y, x.y);
    }
    const float other = __shfl_xor_sync(kAllLanes, odd ? x.x : x.y, 8);
    float2 channels = odd ? float2{other, x.y} : float2{x.x, other};
    if (channel >= kWidth - kRotary) {
      channels = RotateBack(channels, shared.rotation[(channel - (kWidth - kRotary)) / 2]);
    }
    if (exists) {
      *reinterpret_cast<uint32_t*>(out + channel) = PackBf16x2(channels.x, channels.y);
    }
    pieces += kClusterThreads;
    channel += kChannelsAtOnce;
  }
}

}  // namespace dsv4
