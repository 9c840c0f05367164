// route_plan: rows sorted by expert (stable), groups padded to tiles, in one launch of one cluster.
//
// Blocks, and in them warps, take consecutive rows and count experts; a row's slot is what comes
// before it: lower experts' tiles, then its expert's rows in earlier blocks, warps and lanes.

#include <cooperative_groups.h>

#include "dsv4/ffi.h"
#include "dsv4/router.h"
#include "router.cuh"

namespace dsv4 {
namespace {

namespace cg = cooperative_groups;

constexpr int kBlocks = 8;
constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarp;
constexpr int kFillLanes = 8;  // that fill an expert's last tile

struct Problem {
  const int32_t* expert_ids;  // [num_rows]
  const bool* valid;          // [num_rows / rows_per_token]
  int num_rows, rows_per_token, num_experts, tile, num_tiles;
  int32_t *tile_expert, *row_of_slot, *slot_of_row, *group_sizes;
};

// The row's expert; num_experts for rows that take no part.
__device__ __forceinline__ int GroupOf(const Problem& p, int row) {
  int expert = p.expert_ids[row];
  bool known = 0 <= expert && expert < p.num_experts;
  return known && p.valid[row / p.rows_per_token] ? expert : p.num_experts;
}

// The lanes of the same group; groups have num_bits bits.
__device__ __forceinline__ unsigned PeersOf(int group, int num_bits) {
  unsigned peers = kAllLanes;
  for (int bit = 0; bit < num_bits; ++bit) {
    bool set = group >> bit & 1;
    unsigned lanes = __ballot_sync(kAllLanes, set);
    peers &= set ? lanes : ~lanes;
  }
  return peers;
}

// Calls use(row, group, peers) for the warp's rows, in order; peers are the lanes of that group.
template <typename Use>
__device__ __forceinline__ void ForRows(const Problem& p, int begin, int end, Use use) {
  int num_bits = kWarp - __clz(p.num_experts);
  for (int first = begin; first < end; first += kWarp) {
    int row = first + static_cast<int>(threadIdx.x) % kWarp;
    int group = row < end ? GroupOf(p, row) : p.num_experts;
    use(row, group, PeersOf(group, num_bits));
    __syncwarp();
  }
}

// begins[e] = sum of the tiles of lower experts, for e up to num_experts; by one warp.
__device__ void ScanTiles(const Problem& p, const int* sizes, int* begins) {
  int lane = threadIdx.x % kWarp;
  int per_lane = p.num_experts / kWarp + 1;
  int first = min(lane * per_lane, p.num_experts + 1);
  int last = min(first + per_lane, p.num_experts + 1);
  auto tiles = [&](int expert) {
    return expert < p.num_experts ? (sizes[expert] + p.tile - 1) / p.tile : 0;
  };
  int sum = 0;
  for (int expert = first; expert < last; ++expert) sum += tiles(expert);
  int up_to = sum;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    int below = __shfl_up_sync(kAllLanes, up_to, offset);
    if (lane >= offset) up_to += below;
  }
  int begin = up_to - sum;
  for (int expert = first; expert < last; ++expert) {
    begins[expert] = begin;
    begin += tiles(expert);
  }
}

__global__ void __cluster_dims__(kBlocks) __launch_bounds__(kThreads) RoutePlan(Problem p) {
  extern __shared__ int shared[];
  int* counts = shared;                             // [kWarps, num_experts], of lower warps
  int* of_block = counts + kWarps * p.num_experts;  // [num_experts]
  int* lower = of_block + p.num_experts;            // [num_experts], of lower blocks
  int* sizes = lower + p.num_experts;               // [num_experts]
  int* begins = sizes + p.num_experts;              // [num_experts + 1], in tiles
  auto cluster = cg::this_cluster();
  int block = cluster.block_rank(), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int per_warp = (p.num_rows + kBlocks * kWarps - 1) / (kBlocks * kWarps);
  int begin = min((block * kWarps + warp) * per_warp, p.num_rows);
  int end = min(begin + per_warp, p.num_rows);
  int* mine = counts + warp * p.num_experts;

  for (int i = lane; i < p.num_experts; i += kWarp) mine[i] = 0;
  __syncwarp();
  ForRows(p, begin, end, [&](int, int group, unsigned peers) {
    if (group < p.num_experts && lane == __ffs(peers) - 1) mine[group] += __popc(peers);
  });
  __syncthreads();
  for (int expert = threadIdx.x; expert < p.num_experts; expert += kThreads) {
    int count[kWarps], sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) count[w] = counts[w * p.num_experts + expert];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      counts[w * p.num_experts + expert] = sum;
      sum += count[w];
    }
    of_block[expert] = sum;
  }
  cluster.sync();
  for (int expert = threadIdx.x; expert < p.num_experts; expert += kThreads) {
    int total = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (b == block) lower[expert] = total;
      total += cluster.map_shared_rank(of_block, b)[expert];
    }
    sizes[expert] = total;
    if (block == 0) p.group_sizes[expert] = total;
  }
  __syncthreads();
  if (warp == 0) ScanTiles(p, sizes, begins);
  __syncthreads();

  ForRows(p, begin, end, [&](int row, int group, unsigned peers) {
    int slot = p.num_tiles * p.tile;
    bool takes_part = group < p.num_experts;
    if (takes_part) {
      int rank = __popc(peers & ((1u << lane) - 1));
      slot = begins[group] * p.tile + lower[group] + mine[group] + rank;
      p.row_of_slot[slot] = row;
    }
    __syncwarp();
    if (takes_part && lane == __ffs(peers) - 1) mine[group] += __popc(peers);
    if (row < end) p.slot_of_row[row] = slot;
  });

  // The experts of tiles, and what is left of each expert's last; then tiles that none needs.
  int first_expert = (block * kThreads + static_cast<int>(threadIdx.x)) / kFillLanes;
  int fill_lane = threadIdx.x % kFillLanes;
  for (int expert = first_expert; expert < p.num_experts;
       expert += kBlocks * kThreads / kFillLanes) {
    int tile = begins[expert], last = begins[expert + 1];
    for (int i = tile + fill_lane; i < last; i += kFillLanes) p.tile_expert[i] = expert;
    for (int i = tile * p.tile + sizes[expert] + fill_lane; i < last * p.tile; i += kFillLanes) {
      p.row_of_slot[i] = p.num_rows;
    }
  }
  int unused = begins[p.num_experts], thread = block * kThreads + threadIdx.x;
  for (int i = unused + thread; i < p.num_tiles; i += kBlocks * kThreads) {
    p.tile_expert[i] = p.num_experts - 1;
  }
  for (int i = unused * p.tile + thread; i < p.num_tiles * p.tile; i += kBlocks * kThreads) {
    p.row_of_slot[i] = p.num_rows;
  }
  // Other blocks read of_block.
  cluster.sync();
}

constexpr int SharedBytes(int num_experts) {
  return ((kWarps + 4) * num_experts + 1) * sizeof(int);
}

ffi::Error Impl(cudaStream_t stream, ffi::AnyBuffer expert_ids, ffi::AnyBuffer valid, int32_t tile,
                ffi::Result<ffi::AnyBuffer> tile_expert, ffi::Result<ffi::AnyBuffer> row_of_slot,
                ffi::Result<ffi::AnyBuffer> slot_of_row, ffi::Result<ffi::AnyBuffer> group_sizes) {
  DSV4_CHECK(ExpectRoutePlan(expert_ids, valid, *tile_expert, *row_of_slot, *slot_of_row,
                             *group_sizes, tile));
  Problem p = {};
  p.expert_ids = expert_ids.typed_data<int32_t>();
  p.valid = valid.typed_data<bool>();
  p.num_rows = expert_ids.element_count();
  p.rows_per_token = p.num_rows / std::max<int64_t>(valid.element_count(), 1);
  p.num_experts = group_sizes->element_count();
  p.tile = tile;
  p.num_tiles = tile_expert->element_count();
  p.tile_expert = tile_expert->typed_data<int32_t>();
  p.row_of_slot = row_of_slot->typed_data<int32_t>();
  p.slot_of_row = slot_of_row->typed_data<int32_t>();
  p.group_sizes = group_sizes->typed_data<int32_t>();

  static const cudaError_t more_shared_memory = cudaFuncSetAttribute(
      RoutePlan, cudaFuncAttributeMaxDynamicSharedMemorySize, SharedBytes(kMaxExperts));
  DSV4_CHECK(CudaStatus(more_shared_memory));
  RoutePlan<<<kBlocks, kThreads, SharedBytes(p.num_experts), stream>>>(p);
  return CudaStatus(cudaGetLastError());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_route_plan, Impl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<int32_t>("tile")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
