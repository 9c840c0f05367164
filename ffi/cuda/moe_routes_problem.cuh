// What `moe_routes.cuh` works on, and how it lays out shared memory.
#pragma once

#include "moe_problem.cuh"
#include "scaled_sums.cuh"

namespace dsv4 {

// Warps that multiply, that make hidden rows, and one each that copies and that adds up.
constexpr int kRouteWarps = 16, kRowWarps = 8;
constexpr int kRouteThreads = (kRouteWarps + kRowWarps + 2) * kWarp;
constexpr int kMaxRouteRows = kWarp;
constexpr int kMaxRowBytes = 136 * 1024;  // of x and hidden rows
constexpr int kClearThreads = 256;
constexpr int kMostRouteStages = 6, kItemSlots = 4;
// A block of ClearRoutes fits beside it.
constexpr int kMaxRouteSharedBytes = 226 * 1024;

struct RouteProblem {
  Routing routing;
  ExpertMatrices routed, shared;
  const uint16_t* x;  // bfloat16 [num_tokens, d]
  uint16_t* gate_up;  // bfloat16 [rows, 2, f]
  float* out;         // [num_tokens, d]
  int* next_item;
  int* hidden_done;  // [rows], items that are written; a pitch apart
  int num_shared;    // tokens that the shared expert takes: all, or none
  int d, f, num_stages;
  float limit;
  bool quantize;
};

template <WeightFormat format>
struct RouteStage {
  static constexpr int kCodes = 32 * 1024, kBlocks = kCodes / CodeBytes(format);
  uint8_t codes[kCodes];
  uint8_t scales[kBlocks * ScaleBytes(format)];
};

struct RouteRing {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void Advance(int num_stages) {
    if (++slot == num_stages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

constexpr int kSharedRoute = -1;
struct RouteRow {
  int token, expert, route;
};

// In shared memory; stages, x and hidden rows follow.
struct alignas(128) RouteShared {
  uint64_t full[kMostRouteStages], empty[kMostRouteStages];
  uint64_t item_full[kItemSlots], item_empty[kItemSlots];
  uint64_t sum_full[2], sum_empty[2], row_full[kMaxRouteRows];
  int items[kItemSlots];
  int num_rows;
  RouteRow rows[kMaxRouteRows];
  int half_of_row[kMaxRouteRows];
  float weight_of_route[kMaxRouteRows];
  alignas(16) float sums[2][8][kBlockRows];  // of each block of a stage
  alignas(128) uint8_t zeros[128];
};

inline int MaxRouteRows(const RouteProblem& p) {
  return p.num_shared + p.routing.num_tokens * p.routing.top_k;
}

inline int RowBytes(const RouteProblem& p) {
  return 2 * (p.routing.num_tokens * p.d + MaxRouteRows(p) * p.f);
}

template <WeightFormat format>
int RouteSharedBytes(const RouteProblem& p) {
  constexpr int kFewest = sizeof(RouteShared) + 2 * sizeof(RouteStage<format>) + kMaxRowBytes;
  static_assert(kFewest <= kMaxRouteSharedBytes, "stages");
  return static_cast<int>(sizeof(RouteShared) + p.num_stages * sizeof(RouteStage<format>)) +
         RowBytes(p);
}

}  // namespace dsv4
