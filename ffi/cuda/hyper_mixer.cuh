// The warps of hyper-connections that hold channels: mix the streams, collapse and norm them.
#pragma once

#include "hyper_connections.cuh"

namespace dsv4 {
namespace hyper {

// What the threads do that hold channels.
template <bool kSpread>
class Mixer {
 public:
  __device__ __forceinline__ Mixer(const Problem& p, const Place& place, Shared& shared)
      : p_(p), place_(place), s_(shared) {
    channel_ = place.rank * kBlockChannels + Warp() * kWarpChannels + Quad() * kLaneChannels;
  }

  __device__ __forceinline__ void Run() {
    for (uint32_t tile = 0; tile < kAhead; ++tile) ReadAhead(tile);
    LoadWeights();
    WaitForCluster();
    for (uint32_t tile = 0; tile < place_.num_tiles + kNormLag; ++tile) {
      if (tile < place_.num_tiles) Mix(tile);
      // Of a tile before the first the number is huge.
      if (tile - kCollapseLag < place_.num_tiles) Collapse(tile - kCollapseLag);
      if (tile - kNormLag < place_.num_tiles) Norm(tile - kNormLag);
      ReadAhead(tile + kAhead);
    }
  }

 private:
  static __device__ __forceinline__ int Warp() { return threadIdx.x / kWarp; }
  static __device__ __forceinline__ int Lane() { return threadIdx.x % kWarp; }
  static __device__ __forceinline__ int Row() { return Lane() / 4; }  // token of the tile
  static __device__ __forceinline__ int Quad() { return Lane() % 4; }

  __device__ __forceinline__ uint4& Mine(uint32_t tile, int piece) {
    return s_.tiles[tile % kStages][piece][threadIdx.x];
  }

  __device__ __forceinline__ void ReadAhead(uint32_t tile) {
    if (tile < place_.num_tiles) {
      int first = place_.FirstToken(tile);
      int64_t token = first + Row();
      bool inside = token < p_.num_tokens;
      if (!inside) token = 0;
      const uint16_t* source = p_.streams + token * kNumStreams * p_.width + channel_;
#pragma unroll
      for (int j = 0; j < kNumStreams; ++j) {
        CopyAsync(&Mine(tile, j), source, inside);
        source += p_.width;
      }
      if (kSpread) {
        CopyAsync(&Mine(tile, kNumStreams), p_.output + token * p_.width + channel_, inside);
        ReadMixing(tile, Lane() / kTileTokens, first + Lane() % kTileTokens);
        if (Lane() < kTileTokens) ReadMixing(tile, kNumStreams, first + Lane());
      }
    }
    CommitCopies();
  }

  __device__ __forceinline__ void ReadMixing(uint32_t tile, int piece, int token) {
    bool inside = token < p_.num_tokens;
    int64_t row = inside ? token : 0;
    const float* source = piece == 0 ? p_.post + row * kNumStreams
                                     : p_.comb + (row * kNumStreams + piece - 1) * kNumStreams;
    CopyAsync(&s_.mixing[tile % kAhead][Warp()][piece][token % kTileTokens], source, inside);
  }

  // The upper eight rows of each operand are the leading terms, the lower eight what they lack.
  __device__ __forceinline__ void LoadWeights() {
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2 * kNumStreams; ++i) {
        int64_t column = int64_t{i / 2} * p_.width + channel_ + i % 2 * 4;
        float4 w = __ldg(reinterpret_cast<const float4*>(
            p_.fn + int64_t{tile * 8 + Row()} * kNumStreams * p_.width + column));
        fn_[tile][i][0] = Pack({w.x, w.y});
        fn_[tile][i][2] = Pack({w.z, w.w});
        float2 a = Unpack(fn_[tile][i][0]), b = Unpack(fn_[tile][i][2]);
        fn_[tile][i][1] = Pack({w.x - a.x, w.y - a.y});
        fn_[tile][i][3] = Pack({w.z - b.x, w.w - b.y});
      }
    }
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      norm_weight_[pair] =
          __ldg(reinterpret_cast<const float2*>(p_.norm_weight + channel_) + pair);
    }
  }

  __device__ __forceinline__ void Mix(uint32_t tile) {
    WaitCopiesExcept<kAhead - 1>();
    __syncwarp();
    uint4 streams[kNumStreams];
#pragma unroll
    for (int j = 0; j < kNumStreams; ++j) streams[j] = Mine(tile, j);
    if (kSpread) {
      Mixing mixing;
      const auto& pieces = s_.mixing[tile % kAhead][Warp()];
      mixing.post = pieces[0][Row()];
#pragma unroll
      for (int j = 0; j < kNumStreams; ++j) mixing.comb[j] = pieces[1 + j][Row()];
      mixing.Apply(Mine(tile, kNumStreams), streams);
#pragma unroll
      for (int k = 0; k < kNumStreams; ++k) Mine(tile, k) = streams[k];
      int64_t token = place_.FirstToken(tile) + Row();
      if (token < p_.num_tokens) {
        uint16_t* to = p_.new_streams + token * kNumStreams * p_.width + channel_;
#pragma unroll
        for (int k = 0; k < kNumStreams; ++k) {
          *reinterpret_cast<uint4*>(to) = streams[k];
          to += p_.width;
        }
      }
    }
    float sums[kRowTiles][4] = {};
    Squares squares;
#pragma unroll
    for (int k = 0; k < kNumStreams; ++k) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        Mma(sums[i], fn_[i][2 * k], streams[k].x, streams[k].y);
        Mma(sums[i], fn_[i][2 * k + 1], streams[k].z, streams[k].w);
      }
      squares.Add(streams[k]);
    }
    auto& to = s_.of_warps[tile % kSlots][Warp()];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      to[2 * Quad()][i * 8 + Row()] = sums[i][0] + sums[i][2];
      to[2 * Quad() + 1][i * 8 + Row()] = sums[i][1] + sums[i][3];
    }
    if (Lane() == SquareLane(Row())) to[Row()][kGateRows] = squares.Sum(Lane());
    __syncwarp();
    if (Lane() == 0) Arrive(&s_.summed[tile % kSlots]);
  }

  __device__ __forceinline__ void Collapse(uint32_t tile) {
    uint32_t slot = tile % kSlots;
    WaitBarrier(&s_.gated[slot], SlotParity(tile));
    float4 pre = s_.pre[slot][Row()];
    uint4 streams[kNumStreams], collapsed;
#pragma unroll
    for (int j = 0; j < kNumStreams; ++j) streams[j] = Mine(tile, j);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      float2 y = {0.0f, 0.0f};
#pragma unroll
      for (int j = 0; j < kNumStreams; ++j) {
        float2 x = Unpack((&streams[j].x)[pair]);
        y.x = fmaf(Mixing::Element(pre, j), x.x, y.x);
        y.y = fmaf(Mixing::Element(pre, j), x.y, y.y);
      }
      (&collapsed.x)[pair] = Pack(y);
    }
    Mine(tile, kNumStreams) = collapsed;

    Squares squares;
    squares.Add(collapsed);
    if (Lane() == SquareLane(Row())) {
      s_.squares_of_warps[slot][Warp()][Row()] = squares.Sum(Lane());
    }
    __syncwarp();
    if (Lane() == 0) Arrive(&s_.collapsed[slot]);
  }

  __device__ __forceinline__ void Norm(uint32_t tile) {
    uint32_t slot = tile % kSlots;
    WaitBarrier(&s_.normed[slot], SlotParity(tile));
    float scale = s_.norm_scale[slot][Row()];
    int64_t token = place_.FirstToken(tile) + Row();
    if (token >= p_.num_tokens) return;
    uint4 y = Mine(tile, kNumStreams);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      float2 x = Unpack((&y.x)[pair]), w = norm_weight_[pair];
      (&y.x)[pair] = Pack({x.x * scale * w.x, x.y * scale * w.y});
    }
    *reinterpret_cast<uint4*>(p_.x + token * p_.width + channel_) = y;
  }

  const Problem& p_;
  const Place& place_;
  Shared& s_;
  int channel_;
  uint32_t fn_[kRowTiles][2 * kNumStreams][4];
  float2 norm_weight_[4];
};

}  // namespace hyper
}  // namespace dsv4
