// Hyper-connections: spread of an output over the streams, and their projection onto the gates.
#pragma once

#include "hyper_connections.cuh"
#include "mbarrier.cuh"

namespace dsv4 {
namespace hyper {

// Of few tokens a block has the channels of one step; its few warps leave room for the next kernel.
template <int kSteps>
constexpr int kProjectThreads = (kSteps == 1 ? 8 : 16) * kWarp;
constexpr int kTileTokens = 8, kRowTiles = kGateRows / 8;
constexpr int kAhead = 2;  // steps under way to each warp
constexpr int kStepOperands = kRowTiles * 2 * kNumStreams * kWarp;

// What a warp reads: of each lane its own channels; of each token post and rows of comb.
struct WarpInputs {
  uint4 pieces[kAhead][kNumStreams + 1][kWarp];
  float4 mixing[2][kNumStreams + 1][kTileTokens];
};

template <int kSteps>
struct ProjectShared {
  WarpInputs inputs[kProjectThreads<kSteps> / kWarp];
  uint4 operands[kSteps][kStepOperands];
};
static_assert(sizeof(ProjectShared<kStepsPerSum>) <= 227 << 10, "a block has no more");

// Sixteen bytes, or zeros. Complete after WaitCopiesExcept.
__device__ __forceinline__ void CopyAsync(void* destination, const void* source, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(destination)),
               "l"(source), "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void WaitCopiesExcept() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// c += a b for a [16, 16] and b [16, 8] bfloat16.
__device__ __forceinline__ void Mma(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// The projection of a block's channels, as operands of Mma: the upper eight rows are the leading
// terms in bfloat16, the lower eight what they lack.
template <int kSteps>
class Weights {
 public:
  __device__ __forceinline__ Weights(const Problem& p, int first_channel) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      int i = threadIdx.x + j * kProjectThreads<kSteps>, row = i / 256 % kRowTiles * 8 + i / 8 % 8;
      int64_t channel = first_channel + i / kStepOperands * kStepChannels + i % 8 * 4;
      pieces_[j] = __ldg(reinterpret_cast<const float4*>(
          p.fn + (int64_t{row} * kNumStreams + i / 64 % kNumStreams) * p.width + channel));
    }
  }

  __device__ __forceinline__ void Split(uint4* operands) const {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      int i = threadIdx.x + j * kProjectThreads<kSteps>;
      float4 w = pieces_[j];
      uint32_t upper = Pack({w.x, w.y}), lower = Pack({w.z, w.w});
      float2 a = Unpack(upper), b = Unpack(lower);
      operands[i / 64 * 64 + i % 2 * kWarp + i % 64 / 2] = {
          upper, Pack({w.x - a.x, w.y - a.y}), lower, Pack({w.z - b.x, w.w - b.y})};
    }
  }

 private:
  static constexpr int kPieces = kSteps * kStepOperands / kProjectThreads<kSteps>;
  static_assert(kPieces * kProjectThreads<kSteps> == kSteps * kStepOperands, "");
  float4 pieces_[kPieces];
};

// One warp's tiles of 8 tokens, a step after another. A lane has 8 channels of token lane / 4.
template <bool kSpread, int kSteps>
class Projector {
 public:
  __device__ __forceinline__ Projector(const Problem& p, ProjectShared<kSteps>& shared)
      : p_(p), inputs_(shared.inputs[threadIdx.x / kWarp]), part_(blockIdx.x % p.num_parts) {
    int group = blockIdx.x / p.num_parts, num_groups = gridDim.x / p.num_parts;
    tile_ = read_tile_ = group + num_groups * (threadIdx.x / kWarp);
    stride_ = num_groups * (kProjectThreads<kSteps> / kWarp);
    first_channel_ = part_ * kSteps * kStepChannels + Lane() % 4 * kLaneChannels;
    for (int slot = 0; slot < kAhead; ++slot) ReadAhead(slot);
  }

  __device__ __forceinline__ void Run(const uint4 (&operands)[kSteps][kStepOperands]) {
    int slot = 0;
    for (int parity = 0; tile_ * kTileTokens < p_.num_tokens; tile_ += stride_, parity ^= 1) {
      bool inside = Token(tile_) < p_.num_tokens;
      Mixing mixing;
      float sums[kRowTiles][2] = {}, squares[2] = {};
#pragma unroll 1
      for (int step = 0; step < kSteps; ++step) {
        WaitCopiesExcept<kAhead - 1>();
        __syncwarp();
        if (kSpread && step == 0) mixing.Load(inputs_.mixing[parity], Lane() / 4);
        uint4 streams[kNumStreams];
#pragma unroll
        for (int j = 0; j < kNumStreams; ++j) streams[j] = inputs_.pieces[slot][j][Lane()];
        if (kSpread) {
          mixing.Apply(inputs_.pieces[slot][kNumStreams][Lane()], streams);
          if (inside) Store(step, streams);
        }
        __syncwarp();
        ReadAhead(slot);
        slot ^= 1;
        Add(operands[step] + Lane(), streams, sums, squares);
      }
      StoreSums(sums, squares);
    }
  }

 private:
  static_assert(kAhead == 2, "slots are 0 and 1");

  static __device__ __forceinline__ int Lane() { return threadIdx.x % kWarp; }
  static __device__ __forceinline__ int Token(int tile) { return tile * kTileTokens + Lane() / 4; }

  __device__ __forceinline__ void ReadAhead(int slot) {
    if (read_tile_ * kTileTokens < p_.num_tokens) {
      bool inside = Token(read_tile_) < p_.num_tokens;
      int64_t token = inside ? Token(read_tile_) : 0;
      int channel = first_channel_ + read_step_ * kStepChannels;
      const uint16_t* source = p_.streams + token * kNumStreams * p_.width + channel;
#pragma unroll
      for (int j = 0; j < kNumStreams; ++j) {
        CopyAsync(&inputs_.pieces[slot][j][Lane()], source, inside);
        source += p_.width;
      }
      if (kSpread) {
        CopyAsync(&inputs_.pieces[slot][kNumStreams][Lane()],
                  p_.output + token * p_.width + channel, inside);
        if (read_step_ == 0) {
          int first = read_tile_ * kTileTokens;
          ReadMixing(Lane() / kTileTokens, first + Lane() % kTileTokens);
          if (Lane() < kTileTokens) ReadMixing(kNumStreams, first + Lane());
        }
      }
      if (++read_step_ == kSteps) {
        read_step_ = 0;
        read_tile_ += stride_;
        read_parity_ ^= 1;
      }
    }
    CommitCopies();
  }

  __device__ __forceinline__ void ReadMixing(int piece, int token) {
    bool inside = token < p_.num_tokens;
    int64_t row = inside ? token : 0;
    const float* source = piece == 0 ? p_.post + row * kNumStreams
                                     : p_.comb + (row * kNumStreams + piece - 1) * kNumStreams;
    CopyAsync(&inputs_.mixing[read_parity_][piece][token % kTileTokens], source, inside);
  }

  __device__ __forceinline__ void Store(int step, const uint4 (&streams)[kNumStreams]) const {
    uint16_t* to = p_.new_streams + int64_t{Token(tile_)} * kNumStreams * p_.width +
                   first_channel_ + step * kStepChannels;
#pragma unroll
    for (int k = 0; k < kNumStreams; ++k) {
      *reinterpret_cast<uint4*>(to) = streams[k];
      to += p_.width;
    }
  }

  // A step's sums begin at zero, so that they do not depend on how many steps follow each other.
  // Squares are on the diagonal of the product of the tokens with each other.
  static __device__ __forceinline__ void Add(const uint4* operands,
                                             const uint4 (&streams)[kNumStreams],
                                             float (&sums)[kRowTiles][2], float (&squares)[2]) {
    float products[kRowTiles][4] = {}, diagonal[4] = {};
#pragma unroll
    for (int i = 0; i < 2 * kNumStreams; ++i) {
      const uint4& x = streams[i / 2];
      uint32_t first = i % 2 ? x.z : x.x, second = i % 2 ? x.w : x.y;
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        Mma(products[tile], operands[(tile * 2 * kNumStreams + i) * kWarp], first, second);
      }
      Mma(diagonal, {first, 0, second, 0}, first, second);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        sums[tile][j] += products[tile][j] + products[tile][2 + j];
      }
      squares[j] += diagonal[j];
    }
  }

  __device__ __forceinline__ void StoreSums(const float (&sums)[kRowTiles][2],
                                            const float (&squares)[2]) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      int row = Lane() / 4, column = Lane() % 4 * 2 + j, token = tile_ * kTileTokens + column;
      if (token >= p_.num_tokens) continue;
      float* to = p_.sums + (int64_t{part_} * p_.num_tokens + token) * kSums;
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) to[tile * 8 + row] = sums[tile][j];
      if (column == row) {
        *reinterpret_cast<float4*>(to + kGateRows) = {squares[j], 0.0f, 0.0f, 0.0f};
      }
    }
  }

  const Problem& p_;
  WarpInputs& inputs_;
  int part_, tile_, stride_, first_channel_;
  int read_tile_, read_step_ = 0, read_parity_ = 0;
};

// A block has the channels of kSteps steps, whose weights it keeps in shared memory. Its warps
// work on their own.
template <bool kSpread, int kSteps>
__global__ void __launch_bounds__(kProjectThreads<kSteps>, 1)
    Project(const __grid_constant__ Problem p) {
  extern __shared__ uint4 memory[];
  auto& shared = *reinterpret_cast<ProjectShared<kSteps>*>(memory);
  asm volatile("griddepcontrol.launch_dependents;");
  Weights<kSteps> weights(p, blockIdx.x % p.num_parts * kSteps * kStepChannels);
  Projector<kSpread, kSteps> projector(p, shared);
  weights.Split(shared.operands[0]);
  __syncthreads();
  projector.Run(shared.operands);
}

}  // namespace hyper
}  // namespace dsv4
