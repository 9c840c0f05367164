// Expert products of a few routes on Hopper, without a plan: each route is a row of its own, and so
// is each token of an expert that all tokens share, whose weights are FP8.
//
// Weights stream through a ring in shared memory, up to 32 KiB of 64 outputs in one piece. First
// come gate and up; then down, where half of the blocks take half of the rows each. The ring runs
// ahead into down while gate and up are under way. Each of 16 warps multiplies its share of every
// stage; one warp adds up what they make. Items of gate and up are taken in order and wait for
// nothing, so that not all blocks need to be resident.
//
// A product's columns are the groups of 32 inputs that the four lanes of a quad own: scales
// multiply sums instead of weights.
#pragma once

#include "moe_routes_problem.cuh"

namespace dsv4 {

template <WeightFormat format>
struct RouteKernel {
  using Stage = RouteStage<format>;
  static constexpr int kListBarrier = 1, kHiddenBarrier = 2;

  const RouteProblem& p;
  RouteShared& shared;
  Stage* stages;
  RouteRing ring;
  RingPosition<kItemSlots> item;
  RingPosition<2> sum;

  __device__ __forceinline__ RouteKernel(const RouteProblem& problem, uint8_t* memory)
      : p(problem), shared(*reinterpret_cast<RouteShared*>(memory)) {
    stages = reinterpret_cast<Stage*>(memory + sizeof(RouteShared));
  }

  __device__ __forceinline__ uint8_t* Token(int token) const {
    return reinterpret_cast<uint8_t*>(stages + p.num_stages) + token * p.d * 2;
  }

  __device__ __forceinline__ uint8_t* Hidden(int row) const {
    return Token(p.routing.num_tokens) + row * p.f * 2;
  }

  __device__ __forceinline__ bool IsShared(int row) const {
    return shared.rows[row].route == kSharedRoute;
  }

  __device__ __forceinline__ int Half() const { return blockIdx.x % 2; }

  // Of gate and up of a row.
  __device__ __forceinline__ int HiddenItems() const { return 2 * (p.f / kBlockRows); }

  template <typename Work>
  __device__ __forceinline__ void ForDownItems(Work work) const {
    for (int tile = blockIdx.x / 2; tile < p.d / kBlockRows; tile += (gridDim.x + 1 - Half()) / 2) {
      work(tile);
    }
  }

  template <typename Work>
  __device__ __forceinline__ void ForRowsOfHalf(Work work) const {
    for (int row = 0; row < shared.num_rows; ++row) {
      if (shared.half_of_row[row] == Half()) work(row);
    }
  }

  // ---- The producer ----

  __device__ void Produce() {
    const int lane = threadIdx.x % kWarp;
    const Route route = LoadRoute(lane);
    InitBarriers(lane);
    ListRows(lane, route);
    asm volatile("bar.arrive %0, %1;" ::"n"(kListBarrier), "n"(kRouteThreads) : "memory");
    // Counters are zero from here on.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    // Asked for ahead: the answer takes as long as a stage.
    int next = lane == 0 ? atomicAdd(p.next_item, 1) : 0;
    const int num_items = shared.num_rows * HiddenItems();
    for (;;) {
      const int number = __shfl_sync(0xffffffffu, next, 0);
      if (lane == 0) next = atomicAdd(p.next_item, 1);
      PushItem(number);
      if (number >= num_items) break;
      const int row = number / HiddenItems(), of_row = number % HiddenItems();
      const int tiles = HiddenItems() / 2;
      if (of_row < tiles) {
        Stream(row, p.shared.gate, p.routed.gate, of_row, p.f, p.d);
      } else {
        Stream(row, p.shared.up, p.routed.up, of_row - tiles, p.f, p.d);
      }
    }
    ForDownItems([&](int tile) {
      ForRowsOfHalf([&](int row) {
        Stream(row, p.shared.down, p.routed.down, tile, p.d, p.f);
      });
    });
  }

  __device__ void InitBarriers(int lane) {
    if (lane < kMostRouteStages) {
      InitBarrier(&shared.full[lane], 1);
      InitBarrier(&shared.empty[lane], kRouteWarps * kArrivalsOfWarp);
    }
    if (lane < kItemSlots) {
      InitBarrier(&shared.item_full[lane], 1);
      InitBarrier(&shared.item_empty[lane], (kRouteWarps + 1) * kArrivalsOfWarp);
    }
    if (lane < 2) {
      InitBarrier(&shared.sum_full[lane], kRouteWarps * kArrivalsOfWarp);
      InitBarrier(&shared.sum_empty[lane], kArrivalsOfWarp);
    }
    InitBarrier(&shared.row_full[lane], kRowWarps * kArrivalsOfWarp);
    FenceBarrierInit();
  }

  struct Route {
    int token, expert_id;
    bool is_valid;
    float weight;
  };

  __device__ __forceinline__ Route LoadRoute(int lane) const {
    const Routing& r = p.routing;
    Route route = {lane / r.top_k};
    if (route.token < r.num_tokens) {
      route.expert_id = r.expert_ids[lane];
      route.is_valid = r.valid[route.token];
      route.weight = r.weights[lane];
    }
    return route;
  }

  // Of each token the shared expert, then its routes, each in the half that has less to read.
  __device__ void ListRows(int lane, const Route& route) {
    const Routing& r = p.routing;
    const int token = route.token, id = route.expert_id;
    const int expert = route.is_valid && 0 <= id && id < r.num_experts ? id : -1;
    shared.weight_of_route[lane] = route.weight;
    const uint32_t takes_part = __ballot_sync(0xffffffffu, expert >= 0);
    const auto routes_before = [&](int route) { return __popc(takes_part & ((1u << route) - 1)); };
    if (expert >= 0) {
      shared.rows[min(token + 1, p.num_shared) + routes_before(lane)] = {token, expert, lane};
    }
    if (lane < p.num_shared) {
      shared.rows[lane + routes_before(lane * r.top_k)] = {lane, 0, kSharedRoute};
    }
    const int num_rows = p.num_shared + __popc(takes_part);
    __syncwarp();
    if (lane == 0) {
      int lead = 0;  // of the first half, in bytes
      for (int row = 0; row < num_rows; ++row) {
        const int bytes = IsShared(row) ? 2 : 1;
        shared.half_of_row[row] = lead > 0;
        lead += lead > 0 ? -bytes : bytes;
      }
      shared.num_rows = num_rows;
    }
    __syncwarp();
  }

  __device__ __forceinline__ void PushItem(int number) {
    WaitBarrier(&shared.item_empty[item.slot], item.parity ^ 1);
    if (threadIdx.x % kWarp == 0) {
      shared.items[item.slot] = number;
      Arrive(&shared.item_full[item.slot]);
    }
    item.Advance();
  }

  // All inputs of 64 outputs.
  __device__ __forceinline__ void Stream(int row, const Weight& of_shared, const Weight& of_routed,
                                         int tile, int outputs, int inputs) {
    if (IsShared(row)) {
      StreamAs<WeightFormat::kFp8Block>(of_shared, row, tile, outputs, inputs);
    } else {
      StreamAs<format>(of_routed, row, tile, outputs, inputs);
    }
  }

  template <WeightFormat kFormat>
  __device__ __forceinline__ void StreamAs(const Weight& weight, int row, int tile, int outputs,
                                           int inputs) {
    constexpr int kBlocks = RouteStage<kFormat>::kBlocks;
    // Scales of FP8 do not come through the ring.
    constexpr int kScales = kFormat == WeightFormat::kFp8Block ? 0 : ScaleBytes(kFormat);
    const int num_blocks = inputs / kBlockColumns;
    const int64_t first = FirstBlock(row, tile, outputs, inputs);
    for (int begin = 0; begin < num_blocks; begin += kBlocks) {
      WaitBarrier(&shared.empty[ring.slot], ring.parity ^ 1);
      if (threadIdx.x % kWarp == 0) {
        const int depth = min(num_blocks - begin, kBlocks);
        Stage& to = stages[ring.slot];
        uint64_t* barrier = &shared.full[ring.slot];
        ArriveExpectingBytes(barrier, depth * (CodeBytes(kFormat) + kScales));
        LoadBulk(to.codes, weight.codes + (first + begin) * CodeBytes(kFormat),
                 depth * CodeBytes(kFormat), barrier);
        if (kScales > 0) {
          LoadBulk(to.scales, weight.scales + (first + begin) * kScales, depth * kScales, barrier);
        }
      }
      __syncwarp();
      ring.Advance(p.num_stages);
    }
  }

  __device__ __forceinline__ int64_t FirstBlock(int row, int tile, int outputs,
                                                int inputs) const {
    return (int64_t{shared.rows[row].expert} * (outputs / kBlockRows) + tile) *
           (inputs / kBlockColumns);
  }

  // ---- Rows ----

  // 128 inputs of a row by a warp.
  __device__ __forceinline__ void StoreInputs(uint8_t* to, int group, uint2 pairs) const {
    if (p.quantize) pairs = RoundGroup(pairs);
    reinterpret_cast<uint2*>(to)[group * kWarp + threadIdx.x % kWarp] = ScaleInputs(pairs);
  }

  __device__ void LoadTokens(int warp) {
    const auto* from = reinterpret_cast<const uint2*>(p.x) + threadIdx.x % kWarp;
    const int groups = p.routing.num_tokens * p.d / kBlockColumns;
    for (int group = warp; group < groups; group += kRouteWarps) {
      StoreInputs(Token(0), group, from[group * kWarp]);
    }
    if (threadIdx.x < sizeof(shared.zeros)) shared.zeros[threadIdx.x] = 0;
  }

  // What the block's half takes, from gate and up.
  __device__ void MakeHiddenRows(int warp) {
    constexpr int kAtOnce = 3;
    const int groups = p.f / kBlockColumns;
    const auto* gate_up = reinterpret_cast<const uint2*>(p.gate_up) + threadIdx.x % kWarp;
    ForRowsOfHalf([&](int row) {
      const int route = shared.rows[row].route;
      const float weight = route == kSharedRoute ? 1 : shared.weight_of_route[route];
      // One thread asks: the answers to all would keep others from the counter.
      if (warp == 0 && threadIdx.x % kWarp == 0) {
        WaitFor(p.hidden_done + row * kCounterPitch, HiddenItems());
      }
      SyncThreads(kHiddenBarrier, kRowWarps * kWarp);
      for (int begin = warp; begin < groups; begin += kAtOnce * kRowWarps) {
        uint2 gate[kAtOnce], up[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int group = min(begin + i * kRowWarps, groups - 1);
          gate[i] = __ldcg(gate_up + (2 * row * groups + group) * kWarp);
          up[i] = __ldcg(gate_up + ((2 * row + 1) * groups + group) * kWarp);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int group = begin + i * kRowWarps;
          if (group >= groups) break;
          StoreInputs(Hidden(row), group, {GatedPair(gate[i].x, up[i].x, weight),
                                           GatedPair(gate[i].y, up[i].y, weight)});
        }
      }
      ArriveAsWarp(&shared.row_full[row]);
    });
  }

  __device__ __forceinline__ uint32_t GatedPair(uint32_t gate, uint32_t up, float weight) const {
    const auto value = [&](uint32_t gate_bits, uint32_t up_bits) {
      return RoundToBfloat16(
          weight * GatedHidden(__uint_as_float(gate_bits), __uint_as_float(up_bits), p.limit));
    };
    constexpr uint32_t kUpper = 0xffff0000u;
    return value(gate << 16, up << 16) | uint32_t{value(gate & kUpper, up & kUpper)} << 16;
  }

  // ---- Products ----

  __device__ void Consume() {
    const int num_items = shared.num_rows * HiddenItems();
    for (;;) {
      const int number = PopItem();
      if (number >= num_items) break;
      const int row = number / HiddenItems(), of_row = number % HiddenItems();
      const int tiles = HiddenItems() / 2;
      Multiply(row, of_row < tiles ? p.shared.gate.scales : p.shared.up.scales,
               of_row % tiles, Token(shared.rows[row].token), p.d);
    }
    ForDownItems([&](int tile) {
      ForRowsOfHalf([&](int row) {
        WaitBarrier(&shared.row_full[row], 0);
        Multiply(row, p.shared.down.scales, tile, Hidden(row), p.f);
      });
    });
  }

  __device__ __forceinline__ int PopItem() {
    WaitBarrier(&shared.item_full[item.slot], item.parity);
    const int number = shared.items[item.slot];
    ArriveAsWarp(&shared.item_empty[item.slot]);
    item.Advance();
    return number;
  }

  // The warp's part of the sums of 64 outputs. `scales` are those of a shared row's weights.
  __device__ __forceinline__ void Multiply(int row, const uint8_t* scales, int tile,
                                           const uint8_t* inputs, int width) {
    unsigned thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // Else addresses would be kept in registers.
    const int lane = thread % kWarp, warp = thread / kWarp, num_blocks = width / kBlockColumns;
    if (IsShared(row)) {
      constexpr int kBlocks = RouteStage<WeightFormat::kFp8Block>::kBlocks;
      // Lane i has that of the warp's block of stage i.
      const int block = warp % kBlocks + lane * kBlocks;
      const uint32_t scale = block < num_blocks ? scales[tile * num_blocks + block] : 0;
      AddBlocks<WeightFormat::kFp8Block>(warp, lane, inputs, num_blocks, scale);
    } else {
      AddBlocks<format>(warp, lane, inputs, num_blocks, 0);
    }
  }

  template <WeightFormat kFormat>
  __device__ __forceinline__ void AddBlocks(int warp, int lane, const uint8_t* inputs,
                                            int num_blocks, uint32_t block_scales) {
    using Scales = SumScales<kFormat>;
    constexpr int kBlocks = RouteStage<kFormat>::kBlocks;
    constexpr int kTiles = kBlocks * kWarpTilesPerBlock / kRouteWarps;
    constexpr int kTileCodes = CodeBytes(kFormat) / kWarpTilesPerBlock;
    const int of_stage = warp % kBlocks, first_tile = warp / kBlocks * kTiles;
    // Lanes off the diagonal read zeros, from other banks than those on it.
    const bool is_diagonal = lane / 4 == lane % 4;
    const int codes_at = of_stage * CodeBytes(kFormat) + first_tile * kTileCodes + lane * 16;
    const int scales_at = of_stage * ScaleBytes(kFormat) +
                          (first_tile * (kWarp / 2) + lane / 4 * 2 + lane % 2) * sizeof(Scales);
    float sums[kTiles][2] = {};
    for (int begin = 0, i = 0; begin < num_blocks; begin += kBlocks, ++i) {
      WaitBarrier(&shared.full[ring.slot], ring.parity);
      const int block = begin + of_stage;
      if (block < num_blocks) {
        const auto* from = reinterpret_cast<const uint4*>(
            is_diagonal ? inputs + block * kRowBytes + lane % 4 * (kRowBytes / 4)
                        : shared.zeros + 32);
        const uint4 row[4] = {from[0], from[1], from[2], from[3]};
        const Stage& stage = stages[ring.slot];
        const auto* scales = reinterpret_cast<const Scales*>(stage.scales + scales_at);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          Scales scale;
          if constexpr (kFormat == WeightFormat::kFp8Block) {
            scale.raw = __shfl_sync(0xffffffffu, block_scales, i);
          } else {
            scale = scales[tile * (kWarp / 2)];
          }
          uint4 chunks[NumChunks(kFormat)];
          LoadChunks(chunks, stage.codes + codes_at + tile * kTileCodes);
          AddScaledProducts(sums[tile], chunks, scale, [&](int part) { return row[part]; });
        }
      }
      ArriveAsWarp(&shared.empty[ring.slot]);
      ring.Advance(p.num_stages);
    }
    WaitBarrier(&shared.sum_empty[sum.slot], sum.parity ^ 1);
    float* to = shared.sums[sum.slot][of_stage] + first_tile * kWarpTileRows + lane / 4;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      float& mine = sums[i / 2][i % 2];
      mine += __shfl_xor_sync(0xffffffffu, mine, 1);  // of lanes 4 g and 4 g + 1
      if (lane % 4 == 0) to[8 * i] = mine;
    }
    ArriveAsWarp(&shared.sum_full[sum.slot]);
    sum.Advance();
  }

  // ---- Sums ----

  __device__ void Finish() {
    const int lane = threadIdx.x % kWarp;
    const int num_items = shared.num_rows * HiddenItems();
    for (;;) {
      const int number = PopItem();
      if (number >= num_items) break;
      const int row = number / HiddenItems();
      const bool is_gate = number % HiddenItems() < HiddenItems() / 2;
      const float2 pair = is_gate ? AddUp(row, p.shared.gate, p.routed.gate)
                                  : AddUp(row, p.shared.up, p.routed.up);
      reinterpret_cast<uint32_t*>(p.gate_up)[number * (kBlockRows / 2) + lane] =
          RoundToBfloat16(pair.x) | uint32_t{RoundToBfloat16(pair.y)} << 16;
      __syncwarp();
      if (lane == 0) Signal(p.hidden_done + row * kCounterPitch);
    }
    ForDownItems([&](int tile) {
      float2 of_token = {};
      int token = 0;
      // Of zero and two numbers, one from each half, the sum does not depend on their order.
      const auto add = [&] {
        float* out = p.out + int64_t{token} * p.d + tile * kBlockRows + 2 * lane;
        atomicAdd(out, of_token.x);
        atomicAdd(out + 1, of_token.y);
        of_token = {};
      };
      ForRowsOfHalf([&](int row) {
        const float2 y = AddUp(row, p.shared.down, p.routed.down);
        if (shared.rows[row].token != token) add();
        token = shared.rows[row].token;
        of_token.x += FromBfloat16(RoundToBfloat16(y.x));
        of_token.y += FromBfloat16(RoundToBfloat16(y.y));
      });
      add();
    });
  }

  // Outputs 2 l and 2 l + 1.
  __device__ __forceinline__ float2 AddUp(int row, const Weight& of_shared,
                                          const Weight& of_routed) {
    const bool is_shared = IsShared(row);
    const float* global_scale = is_shared ? of_shared.global_scale : of_routed.global_scale;
    const float unscale = is_shared ? WeightTiles<WeightFormat::kFp8Block>::kUnscale
                                    : WeightTiles<format>::kUnscale;
    const float scale = kInputUnscale * unscale * global_scale[shared.rows[row].expert];
    WaitBarrier(&shared.sum_full[sum.slot], sum.parity);
    float2 pair = {};
#pragma unroll
    for (int i = 0; i < Stage::kBlocks; ++i) {
      if (is_shared && i >= RouteStage<WeightFormat::kFp8Block>::kBlocks) continue;
      const auto* part = reinterpret_cast<const float2*>(shared.sums[sum.slot][i]);
      pair.x += part[threadIdx.x % kWarp].x;
      pair.y += part[threadIdx.x % kWarp].y;
    }
    ArriveAsWarp(&shared.sum_empty[sum.slot]);
    sum.Advance();
    return {pair.x * scale, pair.y * scale};
  }

  __device__ __forceinline__ void Run() {
    const int warp = threadIdx.x / kWarp;
    if (warp == kRouteWarps) return Produce();
    if (warp < kRouteWarps) LoadTokens(warp);
    SyncThreads(kListBarrier, kRouteThreads);
    if (warp < kRouteWarps) return Consume();
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (warp == kRouteWarps + 1) return Finish();
    MakeHiddenRows(warp - kRouteWarps - 2);
  }
};

template <WeightFormat format>
__global__ void __launch_bounds__(kRouteThreads, 1)
    MoeRoutes(const __grid_constant__ RouteProblem problem) {
  extern __shared__ __align__(128) uint8_t memory[];
  RouteKernel<format>(problem, memory).Run();
}

// A thread for every four outputs.
__global__ void __launch_bounds__(kClearThreads)
    ClearRoutes(int* counters, int num_counters, float* out, int num_outputs) {
  asm volatile("griddepcontrol.launch_dependents;");
  const int i = blockIdx.x * kClearThreads + threadIdx.x;
  if (i < num_counters) counters[i * kCounterPitch] = 0;
  if (i < num_outputs / 4) reinterpret_cast<float4*>(out)[i] = {};
}

}  // namespace dsv4
