// The warps of hyper-connections that add up what all blocks have summed: gates and norms.
#pragma once

#include "hyper_connections.cuh"

namespace dsv4 {
namespace hyper {

__device__ __forceinline__ void Add(float4& a, float4 b) {
  a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w;
}

// Softmax of each row, then columns and rows in turn divided by their sums. A lane has one row,
// four lanes a matrix.
__device__ __forceinline__ void Sinkhorn(float (&row)[kNumStreams], int num_iterations, float eps) {
  float largest = fmaxf(fmaxf(row[0], row[1]), fmaxf(row[2], row[3]));
#pragma unroll
  for (float& x : row) x = expf(x - largest);
  float inverse = Reciprocal(row[0] + row[1] + (row[2] + row[3]));
#pragma unroll
  for (float& x : row) x = x * inverse + eps;
  for (int i = 0;; ++i) {
#pragma unroll
    for (float& x : row) x *= Reciprocal(SumOfQuad(x) + eps);
    if (i + 1 == num_iterations) return;
    inverse = Reciprocal(row[0] + row[1] + (row[2] + row[3]) + eps);
#pragma unroll
    for (float& x : row) x *= inverse;
  }
}

// One of the gate warps, for every kGateWarps-th tile: sends the block's sums of each token to the
// block that owns the token, and makes the gates of the tokens that this one owns.
class Gates {
 public:
  __device__ __forceinline__ Gates(const Problem& p, const Place& place, Shared& shared)
      : p_(p), place_(place), s_(shared), warp_(threadIdx.x / kWarp - kMixWarps) {
    uint32_t j = Lane() % 4;
#pragma unroll
    for (int i = 0; i < kParts; ++i) scale_[i] = __ldg(p.scale + min(i, 2));
    base_[0] = __ldg(p.base + j);
    base_[1] = __ldg(p.base + kNumStreams + j);
#pragma unroll
    for (int k = 0; k < kNumStreams; ++k) {
      base_[2 + k] = __ldg(p.base + (2 + j) * kNumStreams + k);
    }
    inverse_size_ = 1.0f / (kNumStreams * p.width);
  }

  __device__ __forceinline__ void Run() {
    WaitForCluster();
    for (uint32_t tile = warp_; tile < place_.num_tiles; tile += kGateWarps) {
      uint32_t slot = tile % kSlots;
      WaitBarrier(&s_.summed[slot], SlotParity(tile));
      if (Lane() == 0) ArriveExpectingBytes(&s_.gated[slot], sizeof(s_.pre[slot]));
      Send(tile);
      uint32_t token = (place_.rank - kTileTokens * tile) & (place_.num_ranks - 1);
      if (token >= kTileTokens) continue;
      if (Lane() == 0) {
        ArriveExpectingBytes(&s_.gathered[slot],
                             OwnedTokens() * place_.num_ranks * sizeof(s_.totals[0]));
      }
      WaitBarrier(&s_.gathered[slot], SlotParity(tile));
      for (; token < kTileTokens; token += place_.num_ranks) Gate(tile, token);
    }
  }

 private:
  static __device__ __forceinline__ uint32_t Lane() { return threadIdx.x % kWarp; }

  // Sizes of clusters are powers of two. Of 16 blocks the halves take turns.
  __device__ __forceinline__ uint32_t Owner(uint32_t tile, uint32_t token) const {
    return (token + kTileTokens * tile) & (place_.num_ranks - 1);
  }
  __device__ __forceinline__ uint32_t OwnedTokens() const {
    return max(kTileTokens >> place_.log2_ranks, 1);
  }
  // Where the owner collects one rank's sums of a token.
  __device__ __forceinline__ float* Collected(uint32_t slot, uint32_t rank, uint32_t token) const {
    return s_.of_ranks[slot][rank * OwnedTokens() + (token >> place_.log2_ranks)];
  }

  __device__ __forceinline__ void Send(uint32_t tile) {
    uint32_t slot = tile % kSlots;
    for (uint32_t i = Lane(); i < kTileTokens * kSumPieces; i += kWarp) {
      uint32_t token = i / kSumPieces, piece = i % kSumPieces * 4;
      float4 sum = {};
#pragma unroll
      for (int warp = 0; warp < kMixWarps; ++warp) {
        Add(sum, *reinterpret_cast<const float4*>(&s_.of_warps[slot][warp][token][piece]));
      }
      SendAsync(Collected(slot, place_.rank, token) + piece, sum, &s_.gathered[slot],
                Owner(tile, token));
    }
  }

  __device__ __forceinline__ void Gate(uint32_t tile, uint32_t token) {
    uint32_t slot = tile % kSlots, j = Lane() % 4;
    float* totals = s_.totals[warp_];
    if (Lane() < kSumPieces) {
      float4 sum = {};
#pragma unroll 8
      for (uint32_t rank = 0; rank < place_.num_ranks; ++rank) {
        Add(sum, reinterpret_cast<const float4*>(Collected(slot, rank, token))[Lane()]);
      }
      reinterpret_cast<float4*>(totals)[Lane()] = sum;
    }
    __syncwarp();
    float inverse_rms = rsqrtf(totals[kGateRows] * inverse_size_ + p_.norm_eps);
    auto gate = [&](int row, int part) {
      return fmaf(totals[row] * inverse_rms, scale_[part], base_[part]);
    };
    float mine = Sigmoid(gate(j, 0)) + p_.eps;
    float4 pre;
#pragma unroll
    for (int i = 0; i < kNumStreams; ++i) (&pre.x)[i] = __shfl_sync(~0u, mine, i);
    if (Lane() < place_.num_ranks) SendAsync(&s_.pre[slot][token], pre, &s_.gated[slot], Lane());

    float post = 2.0f * Sigmoid(gate(kNumStreams + j, 1));
    float comb[kNumStreams];
#pragma unroll
    for (int k = 0; k < kNumStreams; ++k) comb[k] = gate((2 + j) * kNumStreams + k, 2 + k);
    Sinkhorn(comb, p_.num_iterations, p_.eps);
    int64_t index = place_.FirstToken(tile) + token;
    if (index < p_.num_tokens && Lane() < kNumStreams) {
      p_.new_post[index * kNumStreams + j] = post;
      reinterpret_cast<float4*>(p_.new_comb)[index * kNumStreams + j] = {comb[0], comb[1], comb[2],
                                                                         comb[3]};
    }
  }

  // What a lane turns into gates: how much to collapse and to spread, and a row of the mixing.
  static constexpr int kParts = 2 + kNumStreams;

  const Problem& p_;
  const Place& place_;
  Shared& s_;
  int warp_;
  float scale_[kParts], base_[kParts], inverse_size_;
};

// One warp: the squares of all blocks, and the factors that norm the tokens.
__device__ __forceinline__ void NormScales(const Problem& p, const Place& place, Shared& s) {
  uint32_t lane = threadIdx.x % kWarp, token = lane / 4, quad = lane % 4;
  const float inverse_width = 1.0f / p.width;
  WaitForCluster();
  for (uint32_t tile = 0; tile < place.num_tiles; ++tile) {
    uint32_t slot = tile % kSlots;
    WaitBarrier(&s.collapsed[slot], SlotParity(tile));
    if (lane == 0) {
      ArriveExpectingBytes(&s.squared[slot], place.num_ranks * sizeof(s.squares_of_ranks[0][0]));
    }
    // Two lanes for each rank, with four tokens each.
    float4 of_tokens = {};
    uint32_t rank = lane / 2, half = lane % 2 * 4;
#pragma unroll
    for (int warp = 0; warp < kMixWarps; ++warp) {
      Add(of_tokens, *reinterpret_cast<const float4*>(&s.squares_of_warps[slot][warp][half]));
    }
    if (rank < place.num_ranks) {
      SendAsync(&s.squares_of_ranks[slot][place.rank][half], of_tokens, &s.squared[slot], rank);
    }
    WaitBarrier(&s.squared[slot], SlotParity(tile));
    float sum = 0.0f;
#pragma unroll 4
    for (rank = quad; rank < place.num_ranks; rank += 4) {
      sum += s.squares_of_ranks[slot][rank][token];
    }
    sum = SumOfQuad(sum);
    if (quad == 0) s.norm_scale[slot][token] = rsqrtf(sum * inverse_width + p.norm_eps);
    __syncwarp();
    if (lane == 0) Arrive(&s.normed[slot]);
  }
}

}  // namespace hyper
}  // namespace dsv4
