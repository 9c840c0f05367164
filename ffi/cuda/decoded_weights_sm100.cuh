// A lane's share of a block of tiled weights, stored as an operand of tcgen05: rows of 128 bytes of
// K, their 16-byte parts swizzled by the row's number.
#pragma once

#include "decoded_inputs_sm100.cuh"
#include "weight_tiles.cuh"

namespace dsv4::sm100 {

// What ordinary stores wrote becomes visible to copies and products of the tensor cores.
__device__ __forceinline__ void FenceAsyncProxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The word of four scales of a row, in a block of 128 rows.
__device__ __forceinline__ uint32_t* ScaleWord(uint8_t* block, int32_t row) {
  return reinterpret_cast<uint32_t*>(block + row % 32 * 16 + row / 32 * 4);
}

// The E4M3 codes of two pairs of E2M1 codes in bfloat16 places, short of 2^6.
__device__ __forceinline__ uint32_t CodesOfFp4(uint32_t first, uint32_t second) {
  const uint32_t signs = __byte_perm(first, second, 0x7531) & 0x80808080u;
  return signs | (__byte_perm(first >> 4, second >> 4, 0x6420) & 0x1c1c1c1cu);
}

template <WeightFormat format>
class LaneWeights {
  using Tiles = WeightTiles<format>;
  static constexpr int32_t kChunks = NumChunks(format);

 public:
  // `codes` of a block in shared memory. With `flipped`, the halves of the chunks change places.
  __device__ __forceinline__ LaneWeights(const uint8_t* codes, typename Tiles::RawScale scale,
                                         int32_t warp_tile, int32_t lane, bool flipped)
      : scale_(scale), flipped_(flipped) {
    const uint8_t* tile = codes + warp_tile * kChunks * kChunkBytes + lane * 16;
    const int32_t flip = flipped ? kChunks / 2 : 0;
#pragma unroll
    for (int32_t c = 0; c < kChunks; ++c) {
      const uint4 chunk = *reinterpret_cast<const uint4*>(tile + (c ^ flip) * kChunkBytes);
      words_[c][0] = chunk.x, words_[c][1] = chunk.y;
      words_[c][2] = chunk.z, words_[c][3] = chunk.w;
    }
  }

  // Lanes of the second half of the columns store in another order than those of the first: else
  // both would store to the same banks.
  static __device__ __forceinline__ bool Flipped(int32_t share) { return share >= 2; }

  // Of rows `row` and `row` + 8 columns 32 `share` to 32 `share` + 31, as bfloat16, short of
  // `kUnscale`, of weights that are flipped as `Flipped` says. The second half of the columns lies 128 rows further on.
  __device__ __forceinline__ void StoreBfloat16(uint8_t* operand, int32_t row,
                                                int32_t share) const {
    constexpr int32_t kHalfBytes = 128 * 128;
#pragma unroll
    for (int32_t pair = 0; pair < kStepsPerBlock / 2; ++pair) {
      const Fragment even = Step(2 * pair), odd = Step(2 * pair + 1);
      uint8_t* half = operand + share / 2 * kHalfBytes;
      const int32_t part = share % 2 * 4 + (flipped_ ? pair ^ 2 : pair);
      StorePart(half, row, part, {even.x[0], even.x[2], odd.x[0], odd.x[2]});
      StorePart(half, row + 8, part, {even.x[1], even.x[3], odd.x[1], odd.x[3]});
    }
  }

  // The same, of weights that are not flipped, as E4M3 codes, and their scales.
  __device__ __forceinline__ void StoreCodes(uint8_t* operand, uint8_t* scale_block, int32_t row,
                                             int32_t share) const {
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
#pragma unroll
      for (int32_t half = 0; half < 2; ++half) {
        uint32_t words[4];
#pragma unroll
        for (int32_t s = 0; s < 4; ++s) words[s] = StepCodes(4 * half + s, i);
        StorePart(operand, row + 8 * i, share * 2 + half,
                  {words[0], words[1], words[2], words[3]});
      }
      auto* scale = reinterpret_cast<uint8_t*>(ScaleWord(scale_block, row + 8 * i)) + share;
      *scale = CodeScale(i);
    }
  }

 private:
  static __device__ __forceinline__ void StorePart(uint8_t* operand, int32_t row, int32_t part,
                                                   uint4 words) {
    *reinterpret_cast<uint4*>(operand + PartOffset(row, part)) = words;
  }

  __device__ __forceinline__ Fragment Step(int32_t step) const {
    const int32_t chunk = step / Tiles::kStepsPerChunk;
    const uint32_t(&words)[4] = words_[chunk];
    return Tiles::Decode({words[0], words[1], words[2], words[3]}, step % Tiles::kStepsPerChunk,
                         Tiles::Scales(scale_, flipped_ ? chunk ^ kChunks / 2 : chunk));
  }

  // Four codes of a step, of the first or second row.
  __device__ __forceinline__ uint32_t StepCodes(int32_t step, int32_t i) const {
    const uint32_t(&words)[4] = words_[step / Tiles::kStepsPerChunk];
    if constexpr (format == WeightFormat::kFp8Block) {
      constexpr uint32_t kInOrder = 0x2031;
      return __byte_perm(words[2 * (step % 2) + i], 0, kInOrder);
    } else {
      const uint32_t word = words[step % Tiles::kStepsPerChunk];
      return i == 0 ? CodesOfFp4(word, (word >> 6 & kMagnitudes) | (word << 15 & kSigns))
                    : CodesOfFp4(__funnelshift_r(word, word, 3),
                                 (word << 3 & kMagnitudes) | (word << 14 & kSigns));
    }
  }

  // NaN for what the other kernels decode to infinity.
  __device__ __forceinline__ uint8_t CodeScale(int32_t i) const {
    constexpr bool kFp8 = format == WeightFormat::kFp8Block;
    constexpr uint32_t kInfinite = kFp8 ? 165 : 159, kShort = kFp8 ? 0 : 6;
    const uint32_t scale = kFp8 ? scale_ : scale_ >> (8 * i) & 0xffu;
    return scale >= kInfinite ? 255 : scale + kShort;
  }

  static constexpr uint32_t kMagnitudes = 0x01c001c0u;
  uint32_t words_[kChunks][4];
  typename Tiles::RawScale scale_;
  bool flipped_;
};

}  // namespace dsv4::sm100
