// flush_csa's and flush_hca's work: a block for each sequence and entry.
#pragma once

#include <cfloat>

#include "cache_entry.cuh"
#include "dsv4/cache_flush.h"

namespace dsv4 {

// Of a thread: 64 of them, with one scale, are in a warp.
constexpr int kChannels = 2;
template <int kWidth>
constexpr int kTeam = kWidth / kChannels;
constexpr float kNothing = -INFINITY;

// Values of the thread's channels.
struct Values {
  float x[kChannels];
};

__device__ inline Values Load(const float* source) {
  Values values;
  LoadWords(source, values.x);
  return values;
}

__device__ inline void Store(float* target, const Values& values) {
  StoreWords(reinterpret_cast<uint8_t*>(target), values.x);
}

// e^x, x <= 0, to within some 2^-22; zero below 2^-126.
__device__ inline float Exp(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * 1.4426950408889634f));
  return power;
}

__device__ inline void TeamBarrier(int num_threads) {
  asm volatile("bar.sync 1, %0;" ::"r"(num_threads) : "memory");
}

// `reduce` over the first kTeam<kWidth> threads of the block, of which all call it. Calls with
// the same types take turns with `phase` 0 and 1.
template <int kWidth, typename T, typename Reduce>
__device__ T OverTeam(T of_warp, int phase, Reduce reduce) {
  constexpr int kTeamWarps = kTeam<kWidth> / 32;
  __shared__ T of_warps[2][kTeamWarps];
  if (threadIdx.x % 32 == 0) of_warps[phase][threadIdx.x / 32] = of_warp;
  TeamBarrier(kTeam<kWidth>);
  T result = of_warps[phase][0];
#pragma unroll
  for (int i = 1; i < kTeamWarps; ++i) result = reduce(result, of_warps[phase][i]);
  return result;
}

// x H / sqrt(128) of a key's channels.
__device__ inline void Hadamard(float (&x)[kChannels]) {
  __shared__ Values of_threads[kTeam<kKeyDim>];
  static_assert(kChannels == 2 && kTeam<kKeyDim> == 64, "two channels of two warps");
  const float first = x[0], second = x[1];
  x[0] = first + second, x[1] = first - second;
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) {
#pragma unroll
    for (float& value : x) {
      const float other = __shfl_xor_sync(~0u, value, mask);
      value = threadIdx.x & mask ? other - value : other + value;
    }
  }
  TeamBarrier(kTeam<kKeyDim>);  // An earlier key's values have been read.
  of_threads[threadIdx.x] = {x[0], x[1]};
  TeamBarrier(kTeam<kKeyDim>);
  const Values other = of_threads[threadIdx.x ^ 32];
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    x[i] = threadIdx.x & 32 ? other.x[i] - x[i] : other.x[i] + x[i];
    x[i] *= 0.08838834764831845f;
  }
}

// What finishes an entry beside its pooled channels; loaded while its rows are on their way.
struct Finish {
  int64_t row;
  float weight[kChannels];
  Turn turn;
};

template <int kWidth>
__device__ Finish LoadFinish(const FlushCall& call, const FlushStream& stream, int sequence,
                             int id, int channel) {
  Finish finish = {};
  finish.row = PoolRow(call, stream, sequence, id);
  LoadWeight(stream.weight, channel, finish.weight);
  const int rotary = channel - (kWidth - kRopeDim);
  if (rotary >= 0) finish.turn = TurnAt(id * call.ratio, call.frequencies[rotary / 2]);
  return finish;
}

// Normalises, rotates and stores a pooled entry. `phase` as of OverTeam.
template <EntryFormat kFormat, int kWidth>
__device__ void FinishEntry(const FlushCall& call, const FlushStream& stream, int channel,
                            Values pooled, const Finish& finish, int phase) {
  float(&x)[kChannels] = pooled.x;
  RoundToBfloat16(x);
  float sum = 0.0f;
#pragma unroll
  for (float value : x) sum += value * value;
  auto add = [](float a, float b) { return a + b; };
  sum = OverTeam<kWidth>(SumOfLanes<32>(sum), phase, add);
  const float scale = rsqrtf(sum * (1.0f / kWidth) + call.eps);
#pragma unroll
  for (int i = 0; i < kChannels; ++i) x[i] = RoundToBfloat16(x[i] * scale * finish.weight[i]);
  uint32_t amax = 0;
  if constexpr (kFormat == EntryFormat::kFloatScale) {
    amax = MaxOfLanes<32>(channel < kNopeDim ? AmaxBits(x) : 0);
    auto larger = [](uint32_t a, uint32_t b) { return max(a, b); };
    amax = OverTeam<kWidth>(amax, phase, larger);
  }
  if (channel >= kWidth - kRopeDim) {
    const Turn turns[1] = {finish.turn};
    Rotate(x, turns);
  }
  if constexpr (kWidth == kKeyDim) {
    RoundToBfloat16(x);
    Hadamard(x);
    RoundToBfloat16(x);
  }
  StoreEntry<kFormat, kWidth>(stream.pool, finish.row, channel, x, amax);
}

// The row of a chunk's token in the thread's channels, from `channel` on.
struct Row {
  Values value, score;
};

template <int kRatio, int kRowChannels>
__device__ Row ChunkRow(const FlushCall& call, const FlushStream& stream, int sequence, int token,
                        int channel) {
  const int64_t at =
      (int64_t{sequence} * call.num_tokens + token) * kRowChannels + channel;
  const int place = (call.start[sequence] + token) % kRatio;
  const Values value = Load(stream.value + at), gate = Load(stream.gate + at);
  const Values ape = Load(stream.ape + int64_t{place} * kRowChannels + channel);
  Row row = {value, gate};
#pragma unroll
  for (int i = 0; i < kChannels; ++i) row.score.x[i] += ape.x[i];
  return row;
}

template <EntryFormat kFormat, int kWidth>
__device__ void PoolOverlapping(const FlushCall& call, const FlushStream& stream,
                                const float* tail, int sequence, int id, int channel,
                                int phase) {
  constexpr int kRowChannels = 2 * kWidth, kSlot = kRowParts * kRowChannels;
  const int start = call.start[sequence];
  Values value[kOverlapRows], score[kOverlapRows], ape[kOverlapRows];
  bool absent[kOverlapRows];
  // Everything is under way before the first is used.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int first = (id - 1 + half) * kOverlapRatio, from = half * kWidth + channel;
    const int64_t row = int64_t{sequence} * call.num_tokens + first - start;
    const float* values = stream.value + row * kRowChannels + from;
    const float* gates = stream.gate + row * kRowChannels + from;
    const float* held = tail + (first & (kOverlapRows - 1)) * kSlot + from;
#pragma unroll
    for (int j = 0; j < kOverlapRatio; ++j) {
      const int i = half * kOverlapRatio + j;
      absent[i] = first < 0;
      if (first + j >= start) {
        value[i] = Load(values + j * kRowChannels);
        score[i] = Load(gates + j * kRowChannels);
        ape[i] = Load(stream.ape + j * kRowChannels + from);
      } else {
        value[i] = Load(held + j * kSlot);
        score[i] = Load(held + j * kSlot + kRowChannels);
        ape[i] = {};
      }
    }
  }
  const Finish finish = LoadFinish<kWidth>(call, stream, sequence, id, channel);

  Values pooled;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    float peak = -FLT_MAX;
#pragma unroll
    for (int i = 0; i < kOverlapRows; ++i) {
      float& x = score[i].x[c];
      x = absent[i] ? kNothing : x + ape[i].x[c];
      peak = fmaxf(peak, x);
    }
    float sum = 0.0f, weighted = 0.0f;
#pragma unroll
    for (int i = 0; i < kOverlapRows; ++i) {
      const float share = Exp(score[i].x[c] - peak);
      sum += share;
      weighted += absent[i] ? 0.0f : share * value[i].x[c];
    }
    pooled.x[c] = __fdividef(weighted, sum);
  }
  FinishEntry<kFormat, kWidth>(call, stream, channel, pooled, finish, phase);
}

// Entry 1 + part after the chunk's first; part 0 has the first as well, and the tail, which only
// these two read: what a thread overwrites it alone has read before.
template <EntryFormat kFormat, int kWidth>
__device__ void FlushOverlapping(const FlushCall& call, const FlushStream& stream, int sequence,
                                 int part, int channel) {
  constexpr int kRowChannels = 2 * kWidth;
  const int start = call.start[sequence], length = call.length[sequence];
  const int first = start / kOverlapRatio, end = (start + length) / kOverlapRatio;
  float* tail = stream.tail + (call.layer * call.num_slots + sequence) *
                                  int64_t{kOverlapRows * kRowParts * kRowChannels};
  if (length == 0) return;
  auto store = [&](int token, int half, const Row& row) {
    float* target = tail + (start + token) % kOverlapRows * kRowParts * kRowChannels + half;
    Store(target, row.value);
    Store(target + kRowChannels, row.score);
  };
  auto load = [&](int token, int half) {
    return ChunkRow<kOverlapRatio, kRowChannels>(call, stream, sequence, token, half);
  };
  Row newest[2];
  if (part == 0) {
    newest[0] = load(length - 1, channel);
    newest[1] = load(length - 1, kWidth + channel);
  }
  const int begin = part == 0 ? first : first + 1 + part;
#pragma unroll 1
  for (int id = begin; id < min(part == 0 ? first + 2 : begin + 1, end); ++id) {
    PoolOverlapping<kFormat, kWidth>(call, stream, tail, sequence, id, channel, id - begin);
  }
  if (part > 0) return;
  store(length - 1, channel, newest[0]);
  store(length - 1, kWidth + channel, newest[1]);
  for (int token = max(0, length - kOverlapRows); token < length - 1; ++token) {
    store(token, channel, load(token, channel));
    store(token, kWidth + channel, load(token, kWidth + channel));
  }
}

// What a block of kTeam<kHeadDim> threads does of flush_csa.
template <EntryFormat kFormat>
__device__ void FlushCsaBlock(const FlushCall& call, int part, int sequence, int stream) {
  constexpr EntryFormat kKeyFormat =
      kFormat == EntryFormat::kDense ? EntryFormat::kDense : EntryFormat::kMxfp4;
  const int channel = kChannels * threadIdx.x;
  if (stream == 0) {
    FlushOverlapping<kFormat, kHeadDim>(call, call.streams[0], sequence, part, channel);
  } else if (channel < kKeyDim) {
    FlushOverlapping<kKeyFormat, kKeyDim>(call, call.streams[1], sequence, part, channel);
  }
}

// max, sum and weighted sum of softmaxes.
struct Running {
  Values peak, sum, weighted;

  __device__ void Add(const Running& other) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const float higher = fmaxf(peak.x[c], other.peak.x[c]);
      const float reference = higher == kNothing ? 0.0f : higher;
      const float kept = Exp(peak.x[c] - reference);
      const float added = Exp(other.peak.x[c] - reference);
      sum.x[c] = sum.x[c] * kept + other.sum.x[c] * added;
      weighted.x[c] = weighted.x[c] * kept + other.weighted.x[c] * added;
      peak.x[c] = higher;
    }
  }
};

__device__ inline Running Nothing() {
  Running nothing = {};
#pragma unroll
  for (float& peak : nothing.peak.x) peak = kNothing;
  return nothing;
}

// Teams of a block take turns at rows. For few tokens there is one.
constexpr int kManyTeams = 4, kFewTokens = 4;

// The softmax over tokens [begin, end) of the chunk; the result is right in the first team.
template <int kTeams>
__device__ Running RunOver(const FlushCall& call, const FlushStream& stream, int sequence,
                           int begin, int end, Running running, int team, int channel) {
  constexpr int kRowsInFlight = kTeams == 1 ? 1 : 4;
  if (team > 0) running = Nothing();
  for (int token = begin + team; token < end; token += kTeams * kRowsInFlight) {
    Row rows[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      rows[i] = ChunkRow<kRunningRatio, kHeadDim>(call, stream, sequence,
                                                  min(token + i * kTeams, end - 1), channel);
    }
    Running block = Nothing();
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        if (token + i * kTeams >= end) rows[i].score.x[c] = kNothing;
        block.peak.x[c] = fmaxf(block.peak.x[c], rows[i].score.x[c]);
      }
      const float reference = block.peak.x[c] == kNothing ? 0.0f : block.peak.x[c];
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        const float share = Exp(rows[i].score.x[c] - reference);
        block.sum.x[c] += share;
        block.weighted.x[c] += share * rows[i].value.x[c];
      }
    }
    running.Add(block);
  }
  if constexpr (kTeams > 1) {
    __shared__ Running of_teams[kTeams - 1][kTeam<kHeadDim>];
    __syncthreads();
    if (team > 0) of_teams[team - 1][channel / kChannels] = running;
    __syncthreads();
    if (team == 0) {
      for (int i = 0; i < kTeams - 1; ++i) running.Add(of_teams[i][channel / kChannels]);
    }
  }
  return running;
}

// Folds the chunk's tokens of entry `id` into its softmax; stores the entry if it is complete and
// the tail if it is the last token's.
template <EntryFormat kFormat, int kTeams>
__device__ void FlushRunning(const FlushCall& call, const FlushStream& stream, int sequence,
                             int id, bool is_last, int team, int channel, int phase) {
  const int start = call.start[sequence], end = start + call.length[sequence];
  const int begin_of_entry = id * kRunningRatio, end_of_entry = begin_of_entry + kRunningRatio;
  float* tail = stream.tail + (call.layer * call.num_slots + sequence) *
                                  int64_t{kRunningParts * kHeadDim} + channel;
  Running running = Nothing();
  if (begin_of_entry < start && team == 0) {
    running = {Load(tail), Load(tail + kHeadDim), Load(tail + 2 * kHeadDim)};
  }
  const bool complete = end_of_entry <= end;
  Finish finish = {};
  if (complete && team == 0) {
    finish = LoadFinish<kHeadDim>(call, stream, sequence, id, channel);
  }
  running = RunOver<kTeams>(call, stream, sequence, max(begin_of_entry - start, 0),
                            min(end_of_entry, end) - start, running, team, channel);
  if (team > 0) return;
  if (is_last) {
    Store(tail, running.peak);
    Store(tail + kHeadDim, running.sum);
    Store(tail + 2 * kHeadDim, running.weighted);
  }
  if (!complete) return;
  Values pooled;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const float sum = running.sum.x[c] > 0.0f ? running.sum.x[c] : 1.0f;
    pooled.x[c] = __fdividef(running.weighted.x[c], sum);
  }
  FinishEntry<kFormat, kHeadDim>(call, stream, channel, pooled, finish, phase);
}

// What a block of kTeams teams does of flush_hca. Part 0 has the chunk's first entry, which may
// read the tail, and its last, which writes it.
template <EntryFormat kFormat, int kTeams>
__device__ void FlushHcaBlock(const FlushCall& call, int part, int sequence) {
  const int team = threadIdx.x / kTeam<kHeadDim>;
  const int channel = threadIdx.x % kTeam<kHeadDim> * kChannels;
  const int start = call.start[sequence], length = call.length[sequence];
  if (length == 0) return;
  const int first = start / kRunningRatio, last = (start + length - 1) / kRunningRatio;
  if (part > 0 && first + part >= last) return;
  int id = first + part;
#pragma unroll 1
  for (int phase = 0; phase < 2; ++phase) {
    FlushRunning<kFormat, kTeams>(call, call.streams[0], sequence, id, id == last, team, channel,
                                  phase);
    if (part > 0 || id == last) return;
    id = last;
  }
}

}  // namespace dsv4
