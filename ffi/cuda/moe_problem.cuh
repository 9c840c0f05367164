// The work of the expert kernels: a call's arrays, the items of work that blocks take, and how
// shared memory is laid out for them.
#pragma once

#include "moe_hopper.cuh"
#include "moe_plan.cuh"
#include "scaled_sums.cuh"

namespace dsv4 {

constexpr int kGroups = 4, kGroupWarps = 4;
constexpr int kConsumerWarps = kGroups * kGroupWarps, kConsumers = kConsumerWarps * kWarp;
constexpr int kProducerWarps = 4, kProducers = kProducerWarps * kWarp;
constexpr int kMoeThreads = kConsumers + kProducers;
constexpr int kRowStep = 8;      // rows that the epilogue writes at a time
constexpr int kFewestRows = 16;  // of the smallest blocks of rows of any shape
constexpr int kRowBytes = kBlockColumns * 2;

constexpr int kCounterPitch = 32;  // of counters that have lines of the cache of their own

struct Weight {
  const uint8_t* codes;
  const uint8_t* scales;
  const float* global_scale;  // [num_experts]
};

struct ExpertMatrices {
  Weight gate, up, down;
};

// out = sum over routes of down(weight * swiglu(gate(x), up(x))); without `out`, y = down(hidden).
struct MoeProblem {
  Plan plan;
  Weight gate, up, down;
  const uint16_t* x;  // bfloat16 [num_tokens, d]; this and hidden as they are multiplied
  uint16_t* hidden;   // bfloat16 [rows, f]
  uint16_t* y;        // bfloat16 [rows, d]
  float* out;         // [num_tokens, d]
  int* next_item;
  int* hidden_done;   // [blocks], warps that wrote
  int* rounded;       // [blocks], likewise
  int* columns_done;  // [down tiles], likewise
  int num_tokens, top_k, d, f;
  float limit;
  bool quantize;
};

__device__ __forceinline__ float GatedHidden(float gate, float up, float limit) {
  gate = FromBfloat16(RoundToBfloat16(gate));
  up = FromBfloat16(RoundToBfloat16(up));
  // NaN stays NaN.
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return __fdividef(gate, 1 + __expf(-gate)) * up;
}

enum class Kind : int { kHidden, kRound, kDown, kCombine, kEnd };

struct Item {
  Kind kind;
  int expert, first_row, num_rows;
  int block;  // of rows; of tokens for kCombine
  int tile;   // of outputs
};

// A stage holds `streams` blocks of 64 outputs side by side, kDepth blocks of inputs deep. For
// kHidden the streams alternate between gate and up. Each group takes kUnits blocks of one stream.
template <WeightFormat format_, int streams_, int max_rows_>
struct MoeShape {
  static constexpr WeightFormat format = format_;
  static constexpr int kStreams = streams_, kMaxRows = max_rows_;
  using Tiles = WeightTiles<format>;
  static constexpr int kCodeBytes = CodeBytes(format);
  static constexpr int kWarpTileBytes = kCodeBytes / kWarpTilesPerBlock;
  // Scales that each lane has of its own come through the ring.
  static constexpr bool kLaneScales = ScaleBytes(format) >= 256;
  static constexpr int kScaleBytes = kLaneScales ? ScaleBytes(format) : 0;
  static constexpr int kUnits = format == WeightFormat::kFp8Block ? 1 : 2;
  static constexpr int kDepth = kGroups * kUnits / kStreams, kParts = kGroups / kStreams;
  static constexpr int kInputs = kDepth * kBlockColumns;
  static constexpr int kHiddenOutputs = 32 * kStreams, kDownOutputs = 64 * kStreams;
  // Few rows are multiplied warp by warp, which leaves the compiler free to overlap it with
  // decoding; many by warpgroups, which read each row from shared memory once.
  static constexpr bool kWarpProducts = kMaxRows <= 16;
  // Of one or two rows, sums are scaled instead of weights.
  static constexpr bool kPairs = kWarpProducts && kLaneScales;

  struct alignas(1024) Stage {
    uint8_t rows[kDepth * kMaxRows * kRowBytes];
    uint8_t codes[kStreams * kDepth * kCodeBytes];
    uint8_t scales[kLaneScales ? kStreams * kDepth * kScaleBytes : 16];
  };

  // Partial sums of 8 rows: a pitch for each row and each warp's tile spreads them over banks.
  static constexpr int kPitch = 20, kTilePitch = 176;
  static constexpr int kPartials = kConsumerWarps * kTilePitch;
  static constexpr int kMaxSharedBytes = 227 * 1024;
  static constexpr int kFixedBytes = 2 * kPartials * 4 + 8 * kMaxRows + kRowBytes + 512;
  static constexpr int kStages = (kMaxSharedBytes - kFixedBytes) / sizeof(Stage);
  static_assert(kStages >= 2 && kStages <= 10, "stages");

  struct Shared {
    Stage stages[kStages];
    float partials[2][kPartials];
    uint8_t zeros[kRowBytes];
    int64_t row_offsets[kMaxRows];  // of the producers' item
    Item items[kStages];            // at an item's first stage
    uint64_t full[kStages], empty[kStages];
    int numbers[2];  // of the producers' items
  };
  static_assert(sizeof(Shared) <= kMaxSharedBytes, "shared memory");
};

constexpr int kCombineTokens = 64, kCombineColumns = 64;

// Items are numbered in the order of Kind.
struct ItemCounts {
  int hidden_tiles, down_tiles, columns;
  int hidden_end, round_end, down_end, combine_end;
};

template <typename Shape>
__device__ ItemCounts CountItems(const MoeProblem& p) {
  ItemCounts c;
  int blocks = *p.plan.num_blocks;
  c.hidden_tiles = p.f / Shape::kHiddenOutputs;
  c.down_tiles = p.d / Shape::kDownOutputs;
  c.columns = p.d / kCombineColumns;
  bool whole = p.out != nullptr;
  c.hidden_end = whole ? blocks * c.hidden_tiles : 0;
  c.round_end = c.hidden_end + (whole && p.quantize ? blocks : 0);
  c.down_end = c.round_end + blocks * c.down_tiles;
  int token_blocks = (p.num_tokens + kCombineTokens - 1) / kCombineTokens;
  c.combine_end = c.down_end + (whole ? c.columns * token_blocks : 0);
  return c;
}

__device__ inline Item ItemOfBlock(const MoeProblem& p, Kind kind, int block, int tile) {
  RowBlock rows = p.plan.blocks[block];
  return {kind, rows.expert, rows.first_row, rows.num_rows, block, tile};
}

__device__ inline Item FindItem(const MoeProblem& p, const ItemCounts& c, int number) {
  if (number < c.hidden_end) {
    return ItemOfBlock(p, Kind::kHidden, number / c.hidden_tiles, number % c.hidden_tiles);
  }
  if (number < c.round_end) return ItemOfBlock(p, Kind::kRound, number - c.hidden_end, 0);
  if (number < c.down_end) {
    number -= c.round_end;
    return ItemOfBlock(p, Kind::kDown, number / c.down_tiles, number % c.down_tiles);
  }
  if (number < c.combine_end) {
    number -= c.down_end;
    return {Kind::kCombine, 0, 0, 0, number / c.columns, number % c.columns};
  }
  return {Kind::kEnd, 0, 0, 0, 0, 0};
}

}  // namespace dsv4
