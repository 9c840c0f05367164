// topk_select: a warp for each short row with few to choose, else a block or a cluster of them.

#include <algorithm>
#include <climits>

#include "dsv4/topk.h"
#include "topk.cuh"
#include "topk_row.cuh"

namespace dsv4 {
namespace {

constexpr int kWarpK = 16;
constexpr int kWarpPerLane = 16;
constexpr int kWarpThreads = 128;

// One warp a row; element j of lane l is row[32 j + l].
template <int kPerLane>
__global__ void __launch_bounds__(kWarpThreads)
    SelectShortRows(const float* scores, const int32_t* lengths, int64_t num_rows, int n, int k,
                    float* values, int32_t* indices) {
  int64_t row = blockIdx.x * int64_t{kWarpThreads / kLanes} + threadIdx.x / kLanes;
  if (row >= num_rows) return;
  int lane = threadIdx.x % kLanes;
  int length = lengths == nullptr ? n : min(__ldg(lengths + row), n);
  uint32_t keys[kPerLane];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    int i = j * kLanes + lane;
    keys[j] = i < length ? ScoreKey(__ldg(scores + row * n + i)) : kAbsent;
  }
  uint32_t chosen_key = kAbsent;
  int chosen = -1;
  for (int rank = 0; rank < min(k, length); ++rank) {
    uint32_t own = keys[0];
    int index = lane;
#pragma unroll
    for (int j = 1; j < kPerLane; ++j) {
      if (keys[j] > own) own = keys[j], index = j * kLanes + lane;
    }
    uint32_t best = __reduce_max_sync(kWholeWarp, own);
    int winner = __reduce_min_sync(kWholeWarp, own == best ? index : INT_MAX);
    if (lane == rank) chosen = winner, chosen_key = best;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (j * kLanes + lane == winner) keys[j] = kAbsent;
    }
  }
  if (lane >= k) return;
  values[row * k + lane] = chosen < 0 ? -INFINITY : ScoreOfKey(chosen_key);
  indices[row * k + lane] = chosen;
}

struct Arguments {
  const float* scores;
  const int32_t* lengths;
  int64_t num_rows, n, k;
  float* values;
  int32_t* indices;
};

template <int kPerLane>
cudaError_t LaunchShortRows(cudaStream_t stream, const Arguments& a) {
  constexpr int64_t kPerBlock = kWarpThreads / kLanes;
  const int64_t num_blocks = (a.num_rows + kPerBlock - 1) / kPerBlock;
  SelectShortRows<kPerLane><<<static_cast<unsigned>(num_blocks), kWarpThreads, 0, stream>>>(
      a.scores, a.lengths, a.num_rows, static_cast<int>(a.n), static_cast<int>(a.k), a.values,
      a.indices);
  return cudaGetLastError();
}

template <typename Kernel>
cudaError_t LaunchClusters(cudaStream_t stream, Kernel* kernel, const Arguments& a,
                           int64_t cluster, size_t shared_bytes) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(a.num_rows * cluster);
  config.blockDim = kSelectThreads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, a.scores, a.lengths, static_cast<uint32_t>(a.n),
                            static_cast<uint32_t>(a.k), a.values, a.indices);
}

template <int kPerThread, bool kSpread, bool kSorted>
cudaError_t LaunchHeldRows(cudaStream_t stream, const Arguments& a, int64_t cluster) {
  return LaunchClusters(stream, row::SelectRows<kPerThread, kSpread, kSorted>, a, cluster, 0);
}

template <bool kSorted>
cudaError_t LaunchStreamedRows(cudaStream_t stream, const Arguments& a, int64_t sm_count) {
  constexpr auto kernel = SelectStreamedRows<kSorted>;
  static const cudaError_t allowed = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(SelectShared));
  if (allowed != cudaSuccess) return allowed;
  // Until a block has one chunk, all blocks run at the same time, or candidates do not fit.
  int64_t cluster = 1;
  while (2 * cluster <= kMaxCluster && cluster * kChunk < a.n &&
         2 * cluster * a.num_rows <= kBlocksPerSm * sm_count && 2 * cluster * a.k <= kCapacity) {
    cluster *= 2;
  }
  return LaunchClusters(stream, kernel, a, cluster, sizeof(SelectShared));
}

template <bool kSorted>
cudaError_t LaunchRows(cudaStream_t stream, const Arguments& a) {
  constexpr int kFew = 16, kMany = 64;
  int sm_count = 0, device = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device);
  auto blocks_of_row = [&](int64_t per_thread) {
    int64_t blocks = 1;
    while (blocks * per_thread * kSelectThreads < a.n) blocks *= 2;
    return blocks;
  };
  // Rows are spread until a thread has few elements, unless blocks would wait.
  const int64_t few = blocks_of_row(kFew), many = std::max<int64_t>(blocks_of_row(kMany), 2);
  if (few == 1) return LaunchHeldRows<kFew, false, kSorted>(stream, a, 1);
  if (few == 2) return LaunchHeldRows<2 * kFew, false, kSorted>(stream, a, 1);
  if (few <= kMaxCluster && few * a.num_rows <= sm_count) {
    return LaunchHeldRows<kFew, true, kSorted>(stream, a, few);
  }
  if (many <= kMaxCluster) return LaunchHeldRows<kMany, true, kSorted>(stream, a, many);
  return LaunchStreamedRows<kSorted>(stream, a, sm_count);
}

ffi::Error TopkSelect(cudaStream_t stream, ffi::AnyBuffer scores, ffi::AnyBuffer lengths,
                      ffi::Result<ffi::AnyBuffer> values, ffi::Result<ffi::AnyBuffer> indices,
                      bool sorted) {
  DSV4_CHECK(CheckTopkSelect(scores, lengths, *values, *indices));
  const int64_t n = scores.dimensions().back(), k = values->dimensions().back();
  Arguments a{scores.typed_data<float>(),  lengths.typed_data<int32_t>(),  0, n, k,
              values->typed_data<float>(), indices->typed_data<int32_t>()};
  a.num_rows = static_cast<int64_t>(scores.element_count()) / a.n;
  if (lengths.element_count() == 0) a.lengths = nullptr;
  if (a.num_rows == 0) return ffi::Error::Success();
  if (a.k <= kWarpK && a.n <= kWarpPerLane / 2 * kLanes) {
    return CudaStatus(LaunchShortRows<kWarpPerLane / 2>(stream, a));
  }
  if (a.k <= kWarpK && a.n <= kWarpPerLane * kLanes) {
    return CudaStatus(LaunchShortRows<kWarpPerLane>(stream, a));
  }
  return CudaStatus(sorted ? LaunchRows<true>(stream, a) : LaunchRows<false>(stream, a));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_topk_select, TopkSelect,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("sorted"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
