// Architectures: 90a
// indexer_scores: scores of paged keys, sum over heads of weight * relu(query * key).
//
// A block is one warpgroup and independent of all others. 64 keys are the rows of a product with
// the 64 heads of a query as columns. Keys go from global memory to registers and are decoded
// there; queries lie in shared memory. The tiles of all queries, of whatever length, are one list
// from which every block takes an equal part.

#include <algorithm>
#include <type_traits>

#include "dsv4/indexer.h"
#include "indexer_keys.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 128;
constexpr int kHeads = 64;
constexpr int kTileKeys = 64;
constexpr int kMaxTokens = 4;  // queries that share a decoded key
constexpr int kMaxItems = 8192;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Arguments {
  const void* q;
  const float* weights;
  const uint8_t* codes;
  const uint8_t* scales;
  const int32_t* block_table;
  const int32_t* lengths;
  float* scores;
  int64_t first_entry;  // of the layer
  int64_t min_length;
  int num_tokens, num_items, items_per_sequence, tokens_per_item;
  int table_width, log2_per_block;
};

// K-major, 64 rows of 128 bytes in 128-byte swizzle.
__device__ __forceinline__ uint64_t QueryDescriptor(const void* panel) {
  uint64_t address = static_cast<uint32_t>(__cvta_generic_to_shared(panel));
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{64} << 32 | uint64_t{1} << 62;
}

#define DSV4_ACCUMULATORS                                                                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, "
#define DSV4_OPERANDS                                                                            \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),            \
      "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),    \
      "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), \
      "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
      "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(int{accumulate})

__device__ __forceinline__ void Multiply(MmaE4m3, float (&d)[32], const uint32_t (&a)[4],
                                         uint64_t descriptor, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %37, 0;"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 " DSV4_ACCUMULATORS "1, 1;}"
      : DSV4_OPERANDS);
}

__device__ __forceinline__ void Multiply(MmaBf16, float (&d)[32], const uint32_t (&a)[4],
                                         uint64_t descriptor, bool accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %37, 0;"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " DSV4_ACCUMULATORS "1, 1, 0;}"
      : DSV4_OPERANDS);
}

// Queries of one item: operands in the order of the keys' channels, and what follows the products.
template <typename Mma>
struct Queries {
  static constexpr int kPanelBytes = kHeads * 128;
  static constexpr int kPanels = Mma::kElementBytes;

  uint8_t operand[kMaxTokens][kPanels * kPanelBytes];
  float half_weights[kMaxTokens][kHeads];
  int32_t visible[kMaxTokens];

  template <typename Key>
  __device__ __forceinline__ void Load(const Arguments& a, int64_t query, int count) {
    using Eight = typename Mma::Eight;
    constexpr int kEights = kHeads * kKeyWidth / 8;
    const Eight* q = static_cast<const Eight*>(a.q) + query * kEights;
#pragma unroll 1
    for (int token = 0; token < count; ++token, q += kEights) {
#pragma unroll
      for (int i = threadIdx.x; i < kEights; i += kThreads) {
        int lane = i % kQuad, eight = i / kQuad % 4, head = i / 16;
        Eight words = Key::Arrange(__ldg(q + head * 16 + lane * 4 + eight));
#pragma unroll
        for (int word = 0; word < sizeof(Eight) / 4; ++word) {
          // Two 16-byte chunks a step, of which a lane has 4 bytes each.
          int chunk = eight * (sizeof(Eight) / 4) + word, panel = chunk / 8;
          int offset = panel * kPanelBytes + head * 128 + ((chunk ^ head) % 8) * 16 + lane * 4;
          *reinterpret_cast<uint32_t*>(operand[token] + offset) =
              reinterpret_cast<const uint32_t*>(&words)[word];
        }
      }
    }
    const float* weights = a.weights + query * kHeads;
    for (int i = threadIdx.x; i < count * kHeads; i += kThreads) {
      half_weights[i / kHeads][i % kHeads] = 0.5f * __ldg(weights + i);
    }
    if (threadIdx.x < count) {
      visible[threadIdx.x] =
          min(__ldg(a.lengths + query + threadIdx.x), a.table_width << a.log2_per_block);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }

  __device__ __forceinline__ uint64_t Descriptor(int token, int step) const {
    constexpr int kStepsPerPanel = 4;
    return QueryDescriptor(operand[token] + step / kStepsPerPanel * kPanelBytes) +
           step % kStepsPerPanel * 2;
  }
};

template <typename Mma>
struct Shared {
  Queries<Mma> queries;
  uint2 magnitudes[32];
  int32_t first_tile[1];  // of each item, and their total; num_items + 1
};

// Tiles of an item; none while all its queries see so few keys that each selects all.
__device__ __forceinline__ int CountTiles(const Arguments& a, int item) {
  int first = item % a.items_per_sequence * a.tokens_per_item;
  const int32_t* lengths = a.lengths + item / a.items_per_sequence * a.num_tokens;
  int longest = 0;
#pragma unroll 1
  for (int t = first; t < min(first + a.tokens_per_item, a.num_tokens); ++t) {
    longest = max(longest, __ldg(lengths + t));
  }
  longest = min(longest, a.table_width << a.log2_per_block);
  return longest <= a.min_length ? 0 : (longest + kTileKeys - 1) / kTileKeys;
}

// Lists where the items' tiles begin, but not for a single item; returns how many tiles there are.
__device__ __forceinline__ int ListTiles(const Arguments& a, int32_t* first_tile) {
  if (a.num_items == 1) return CountTiles(a, 0);
#pragma unroll 1
  for (int item = threadIdx.x; item < a.num_items; item += kThreads) {
    first_tile[item + 1] = CountTiles(a, item);
  }
  if (threadIdx.x == 0) first_tile[0] = 0;
  __syncthreads();
  if (threadIdx.x < 32) {
    int lane = threadIdx.x, before = 0;
#pragma unroll 1
    for (int item = lane; item - lane < a.num_items; item += 32) {
      int sum = item < a.num_items ? first_tile[item + 1] : 0;
      for (int offset = 1; offset < 32; offset *= 2) {
        int below = __shfl_up_sync(kAllLanes, sum, offset);
        if (lane >= offset) sum += below;
      }
      if (item < a.num_items) first_tile[item + 1] = before + sum;
      before += __shfl_sync(kAllLanes, sum, 31);
    }
  }
  __syncthreads();
  return first_tile[a.num_items];
}

__device__ __forceinline__ float SumOfQuad(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// Scores of 64 keys for every query of the item; `entry` is the lane's first row.
template <typename Mma>
__device__ __forceinline__ void ScoreTile(const KeyFragment<Mma>& keys,
                                          const Queries<Mma>& queries, int count, int entry,
                                          int64_t capacity, float* scores) {
  int lane = threadIdx.x % kQuad;
#pragma unroll 1
  for (int token = 0; token < count; ++token, scores += capacity) {
    float d[32];
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int step = 0; step < Mma::kSteps; ++step) {
      Multiply(Mma(), d, keys.words[step], queries.Descriptor(token, step), step > 0);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    float sums[2][2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float2 w = *reinterpret_cast<const float2*>(&queries.half_weights[token][8 * i + 2 * lane]);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        // Twice relu, NaN for NaN; with the absolute value as a modifier it is one addition.
        float first = d[4 * i + 2 * row], second = d[4 * i + 2 * row + 1];
        sums[row][0] = fmaf(w.x, first + fabsf(first), sums[row][0]);
        sums[row][1] = fmaf(w.y, second + fabsf(second), sums[row][1]);
      }
    }
    float first = SumOfQuad(sums[0][0] + sums[0][1]) * keys.factors[0];
    float second = SumOfQuad(sums[1][0] + sums[1][1]) * keys.factors[1];
    int own = entry + 8 * lane;
    if (lane < 2 && own < queries.visible[token]) scores[own] = lane ? second : first;
  }
}

// Bfloat16 operands take more registers than four blocks would leave.
template <typename Mma>
constexpr int kBlocksPerSm = std::is_same_v<Mma, MmaBf16> ? 3 : 4;

template <typename Mma, typename Key>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<Mma>)
    ScoreKeys(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<Mma>*>(memory);
  const int64_t total = ListTiles(a, shared.first_tile);
  const int begin = static_cast<int>(total * blockIdx.x / gridDim.x);
  const int last = static_cast<int>(total * (blockIdx.x + 1) / gridDim.x);
  if (begin == last) return;

  int item = 0;  // the one that tile belongs to: the last that does not begin after it
#pragma unroll 1
  for (int above = a.num_items; above - item > 1;) {
    int middle = (item + above) / 2;
    (shared.first_tile[middle] <= begin ? item : above) = middle;
  }
  const int lane = threadIdx.x % kQuad;
  const int row_of_lane = threadIdx.x / 32 * 16 + threadIdx.x % 32 / kQuad;
  const int64_t capacity = int64_t{a.table_width} << a.log2_per_block;
  const uint8_t* codes = Key::CodesOfLane(a.codes + a.first_entry * Key::kCodeBytes, lane);
  const uint8_t* scales = Key::ScalesOfLane(a.scales + a.first_entry * Key::kScaleBytes, lane);
  asm("" : "+l"(codes), "+l"(scales));  // to be kept, not computed again for each tile
  int tile = begin, item_begin = item == 0 ? 0 : shared.first_tile[item];
#pragma unroll 1
  for (; tile < last; ++item) {
    const int item_end = a.num_items == 1 ? total : shared.first_tile[item + 1];
    if (item_end <= tile) continue;
    const int sequence = item / a.items_per_sequence;
    const int first_token = item % a.items_per_sequence * a.tokens_per_item;
    const int count = min(a.tokens_per_item, a.num_tokens - first_token);
    const int64_t query = int64_t{sequence} * a.num_tokens + first_token;
    const int end_tile = min(last, item_end);
    const int32_t* table = a.block_table + int64_t{sequence} * a.table_width;
    int entry = (tile - item_begin) * kTileKeys + row_of_lane;
    item_begin = item_end;
    const int last_entry = entry + (end_tile - 1 - tile) * kTileKeys;

    // A warp's 16 rows are of one block, of which the lane's are 8 apart. Rows past the last entry
    // are read from some block, and not used. After the last tile it is loaded again, unused.
    auto block_of = [&](int of_entry) {
      return max(__ldg(table + min(of_entry >> a.log2_per_block, a.table_width - 1)), 0);
    };
    auto load = [&](Key(&rows)[2], int32_t block, int of_entry) {
      uint32_t within = of_entry & ((1u << a.log2_per_block) - 1);
      uint32_t row = (static_cast<uint32_t>(block) << a.log2_per_block) + within;
      const uint8_t* row_codes = codes + uint64_t{row} * Key::kCodeBytes;
      const uint8_t* row_scales = scales + uint64_t{row} * Key::kScaleBytes;
      rows[0].Load(row_codes, row_scales);
      rows[1].Load(row_codes + 8 * Key::kCodeBytes, row_scales + 8 * Key::kScaleBytes);
    };
    Key rows[2];
    auto ahead = [&](int tiles) { return min(entry + tiles * kTileKeys, last_entry); };
    load(rows, block_of(entry), entry);
    int32_t block = block_of(ahead(1));
    if (tile == begin) FillMagnitudes(shared.magnitudes);
    __syncthreads();  // the queries before are no longer needed
    shared.queries.template Load<Key>(a, query, count);
    __syncthreads();
    float* scores = a.scores + query * capacity;
#pragma unroll 1
    for (; tile < end_tile; ++tile, entry += kTileKeys) {
      KeyFragment<Mma> keys;
      Key::Decode(rows, keys, shared.magnitudes);
      load(rows, block, ahead(1));
      block = block_of(ahead(2));
      ScoreTile(keys, shared.queries, count, entry, capacity, scores);
    }
  }
}

template <typename Mma, typename Key>
cudaError_t Launch(cudaStream_t stream, const Arguments& a) {
  constexpr auto kernel = ScoreKeys<Mma, Key>;
  const int num_bytes = sizeof(Shared<Mma>) + a.num_items * sizeof(int32_t);
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           sizeof(Shared<Mma>) + kMaxItems * sizeof(int32_t));
  if (allowed != cudaSuccess) return allowed;
  int device = 0, sm_count = 0, per_sm = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, kThreads, num_bytes);
  kernel<<<sm_count * std::max(per_sm, 1), kThreads, num_bytes, stream>>>(a);
  return cudaGetLastError();
}

ffi::Error IndexerScores(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer weights,
                         ffi::AnyBuffer codes, ffi::AnyBuffer scales, ffi::AnyBuffer block_table,
                         ffi::AnyBuffer lengths, ffi::Result<ffi::AnyBuffer> scores,
                         int64_t layer, int64_t min_length) {
  IndexerSizes sizes;
  DSV4_CHECK(CheckIndexerScores(q, weights, codes, scales, block_table, lengths, layer, *scores,
                                &sizes));
  if (sizes.num_heads != kHeads || sizes.width != kKeyWidth) {
    return Invalid("q", ShapeText(q.dimensions()), "64 heads of 128 channels");
  }
  const int64_t per_block = sizes.per_block;
  if (per_block < 16 || (per_block & (per_block - 1)) != 0) {
    return Invalid("codes", std::to_string(per_block) + " entries a block",
                   "a power of two, 16 or more");
  }
  DSV4_CHECK(ExpectAligned("q", q, 16));
  DSV4_CHECK(ExpectAligned("codes", codes, 16));
  DSV4_CHECK(ExpectAligned("scales", scales, 4));
  if (sizes.num_blocks < 1 || sizes.num_blocks * per_block > INT32_MAX) {
    return Invalid("codes", std::to_string(sizes.num_blocks) + " blocks",
                   "one or more, with less than 2^31 entries");
  }
  Arguments a{q.untyped_data(), weights.typed_data<float>(),
              static_cast<const uint8_t*>(codes.untyped_data()),
              static_cast<const uint8_t*>(scales.untyped_data()),
              block_table.typed_data<int32_t>(), lengths.typed_data<int32_t>(),
              scores->typed_data<float>()};
  a.first_entry = layer * sizes.num_blocks * per_block;
  a.min_length = min_length;
  a.num_tokens = static_cast<int>(sizes.num_tokens);
  a.tokens_per_item = std::min(kMaxTokens, a.num_tokens);
  if (sizes.batch == 0 || a.num_tokens == 0 || sizes.capacity() == 0) {
    return ffi::Error::Success();
  }
  a.items_per_sequence = (a.num_tokens + a.tokens_per_item - 1) / a.tokens_per_item;
  if (sizes.batch * a.items_per_sequence > kMaxItems) {
    return Invalid("q", ShapeText(q.dimensions()), "at most 32768 queries");
  }
  a.num_items = static_cast<int>(sizes.batch * a.items_per_sequence);
  a.table_width = static_cast<int>(sizes.table_width);
  a.log2_per_block = __builtin_ctzll(per_block);

  const bool e4m3 = q.element_type() == ffi::DataType::F8E4M3FN;
  if (!e4m3 && q.element_type() != ffi::DataType::BF16) {
    return Invalid("q", DtypeText(q.element_type()), "bfloat16 or float8_e4m3fn");
  }
  switch (sizes.format) {
    case KeyFormat::kMxfp4:
      return CudaStatus(e4m3 ? Launch<MmaE4m3, Mxfp4Key>(stream, a)
                             : Launch<MmaBf16, Mxfp4Key>(stream, a));
    case KeyFormat::kFp8:
      return CudaStatus(e4m3 ? Launch<MmaE4m3, Fp8Key>(stream, a)
                             : Launch<MmaBf16, Fp8Key>(stream, a));
    default:
      if (e4m3) return Invalid("q", "float8_e4m3fn", "bfloat16 for NVFP4 keys");
      return CudaStatus(Launch<MmaBf16, Nvfp4Key>(stream, a));
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_indexer_scores, IndexerScores,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("layer")
                                  .Attr<int64_t>("min_length"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
