// Tiles of queries and of dequantised entries in shared memory, 64 rows of 512 bfloat16 channels:
// panels of 64 channels, rows of 128 bytes, their 16-byte parts swizzled by the row's number.
#pragma once

#include "dsv4/attention_problem.h"
#include "moe_hopper.cuh"

namespace dsv4 {

constexpr int kTileRows = 64, kWidth = 512, kRotary = 64;
constexpr int kPanels = kWidth / 64, kPanelBytes = kTileRows * 128;
constexpr int kTileBytes = kPanels * kPanelBytes;

__device__ __forceinline__ uint32_t TileOffset(int row, int panel, int part) {
  return panel * kPanelBytes + row * 128 + ((part ^ row) % 8) * 16;
}

// Two E4M3 codes, given in the high bytes of both halves, times `scale`.
__device__ __forceinline__ uint32_t DecodeCodes(uint32_t codes, uint32_t scale) {
  return MultiplyBf16x2((codes & kSigns) | ((codes >> 4) & 0x07f007f0u), scale);
}

// Eight of them times the E8M0 scale `byte`. In the place of a bfloat16's bits they are short of
// 2^kShort, which the scale brings in.
__device__ __forceinline__ uint4 DecodeCodes(uint32_t low, uint32_t high, uint32_t byte) {
  constexpr uint32_t kShort = 120, kInBothHalves = 0x00800080u;
  constexpr uint32_t kLargest = 254 - kShort;  // byte of a scale that one factor can hold
  const uint32_t scale = (min(byte, kLargest) + kShort) * kInBothHalves;
  uint4 words = {DecodeCodes(__byte_perm(low, 0, 0x1404), scale),
                 DecodeCodes(__byte_perm(low, 0, 0x3424), scale),
                 DecodeCodes(__byte_perm(high, 0, 0x1404), scale),
                 DecodeCodes(__byte_perm(high, 0, 0x3424), scale)};
  if (byte > kLargest) {
    const uint32_t rest = byte == 255 ? 0x7fc07fc0u : (byte - kLargest + 127) * kInBothHalves;
    words = {MultiplyBf16x2(words.x, rest), MultiplyBf16x2(words.y, rest),
             MultiplyBf16x2(words.z, rest), MultiplyBf16x2(words.w, rest)};
  }
  return words;
}

// What a lane has of a record: of every 64 channels the 16 that begin at 16 times its number among
// the four lanes that share the record. An empty slot is zeros.
struct RecordPart {
  static constexpr int kGroups = kPanels - 1;

  uint4 codes[kGroups];
  uint4 rotary[2];
  uint2 scales;

  __device__ __forceinline__ void Load(const Location& at, int lane_of_four) {
    if (at.body == nullptr) {
      *this = {};
      return;
    }
    const auto* parts = reinterpret_cast<const uint4*>(at.body) + lane_of_four;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) codes[i] = __ldg(parts + 4 * i);
    parts += 4 * kGroups + lane_of_four;
    rotary[0] = __ldg(parts);
    rotary[1] = __ldg(parts + 1);
    scales = __ldg(reinterpret_cast<const uint2*>(at.scales));
  }

  __device__ __forceinline__ uint32_t ScaleByte(int group) const {
    return (group < 4 ? scales.x >> 8 * group : scales.y >> 8 * (group - 4)) & 255u;
  }

  __device__ __forceinline__ void Store(uint8_t* tile, int row, int lane_of_four) const {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const uint32_t byte = ScaleByte(i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<uint4*>(tile + TileOffset(row, i, 2 * lane_of_four + half)) =
            DecodeCodes(half ? codes[i].z : codes[i].x, half ? codes[i].w : codes[i].y, byte);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<uint4*>(tile + TileOffset(row, kGroups, 2 * lane_of_four + half)) =
          rotary[half];
    }
  }
};

// Heads of one query from `q` on; rows without a head become zeros.
__device__ __forceinline__ void LoadQueries(uint8_t* tile, const uint16_t* q, int num_heads,
                                            int thread, int num_threads) {
  constexpr int kParts = kWidth / 8;
#pragma unroll 4
  for (int i = thread; i < kTileRows * kParts; i += num_threads) {
    const int row = i / kParts, part = i % kParts;
    uint8_t* to = tile + TileOffset(row, part / 8, part % 8);
    if (row < num_heads) {
      CopyChunk(SharedAddress(to), q + i * 8);
    } else {
      *reinterpret_cast<uint4*>(to) = {};
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// The reverse, for the rows with a head and `kCount` panels from `panel` on.
template <int kCount>
__device__ __forceinline__ void StoreRows(uint16_t* o, const uint8_t* tile, int num_heads,
                                          int panel, int thread, int num_threads) {
#pragma unroll 4
  for (int i = thread; i < num_heads * kCount * 8; i += num_threads) {
    const int row = i / (kCount * 8), part = panel * 8 + i % (kCount * 8);
    reinterpret_cast<uint4*>(o)[row * (kWidth / 8) + part] =
        *reinterpret_cast<const uint4*>(tile + TileOffset(row, part / 8, part % 8));
  }
}

}  // namespace dsv4
