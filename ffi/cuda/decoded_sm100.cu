// gemm of many rows, moe_ffn and grouped_gemm on the sm_100 family: the launches.
// Architectures: 100f

#include <algorithm>

#include "decoded_launch_sm100.cuh"
#include "decoded_moe_sm100.cuh"

namespace dsv4 {
namespace {

using sm100::Operands;
using sm100::Rounding;

int NumMultiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

template <WeightFormat format, int32_t kRows, Operands operands, typename Sink>
cudaError_t LaunchProduct(cudaStream_t stream, const sm100::DecodedGemm& gemm, const Sink& sink,
                          int64_t max_tiles, int32_t cluster_size) {
  constexpr int32_t kDynamicBytes = sm100::DecodedTile<format, kRows, operands>::kDynamicBytes;
  auto* kernel = sm100::DecodedGemmKernel<format, kRows, operands, Sink>;
  // Of the current device.
  const cudaError_t configured =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kDynamicBytes);
  if (configured != cudaSuccess) return configured;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(cluster_size), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = std::min<int64_t>(max_tiles * cluster_size, NumMultiprocessors());
  config.blockDim = sm100::kDecodedThreads;
  config.dynamicSmemBytes = kDynamicBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, gemm, sink);
}

// Numbers that a kernel is compiled for.
struct Variant {
  WeightFormat format;
  Operands operands;
  int32_t tile_rows;
};

template <WeightFormat format, typename Sink>
cudaError_t LaunchFormat(cudaStream_t stream, const Variant& variant,
                         const sm100::DecodedGemm& gemm, const Sink& sink, int64_t max_tiles,
                         int32_t cluster_size) {
  const auto launch = [&](auto* product) {
    return product(stream, gemm, sink, max_tiles, cluster_size);
  };
  const bool few = variant.tile_rows == sm100::kFewTileRows;
  if constexpr (sm100::HasCodes(format)) {
    if (variant.operands == Operands::kCodes) {
      return few ? launch(LaunchProduct<format, sm100::kFewTileRows, Operands::kCodes, Sink>)
                 : launch(LaunchProduct<format, sm100::kManyTileRows, Operands::kCodes, Sink>);
    }
  }
  return few ? launch(LaunchProduct<format, sm100::kFewTileRows, Operands::kBfloat16, Sink>)
             : launch(LaunchProduct<format, sm100::kManyTileRows, Operands::kBfloat16, Sink>);
}

template <typename Sink>
cudaError_t Launch(cudaStream_t stream, const Variant& variant, const sm100::DecodedGemm& gemm,
                   const Sink& sink, int64_t max_tiles, int32_t cluster_size) {
  const auto launch = [&](auto* format) {
    return format(stream, variant, gemm, sink, max_tiles, cluster_size);
  };
  switch (variant.format) {
    case WeightFormat::kMxfp4: return launch(LaunchFormat<WeightFormat::kMxfp4, Sink>);
    case WeightFormat::kNvfp4: return launch(LaunchFormat<WeightFormat::kNvfp4, Sink>);
    case WeightFormat::kFp8Block: return launch(LaunchFormat<WeightFormat::kFp8Block, Sink>);
    case WeightFormat::kBf16: break;
  }
  if constexpr (!Sink::kPairs) return launch(LaunchFormat<WeightFormat::kBf16, Sink>);
  return cudaErrorInvalidValue;
}

cudaError_t LaunchInputs(cudaStream_t stream, const sm100::InputTiles& inputs, int32_t tile_rows,
                         int64_t max_row_blocks) {
  const unsigned columns = inputs.num_groups * CeilDiv(inputs.width, kBlockColumns);
  const dim3 grid(columns, static_cast<unsigned>(max_row_blocks));
  if (tile_rows == sm100::kFewTileRows) {
    sm100::MakeInputTiles<sm100::kFewTileRows>
        <<<grid, sm100::kInputThreads, 0, stream>>>(inputs);
  } else {
    sm100::MakeInputTiles<sm100::kManyTileRows>
        <<<grid, sm100::kInputThreads, 0, stream>>>(inputs);
  }
  return cudaGetLastError();
}

Rounding RoundingOf(bool round_input, bool codes) {
  return !round_input ? Rounding::kNone : codes ? Rounding::kCodes : Rounding::kBfloat16;
}

}  // namespace

ffi::Error LaunchGemmSm100(cudaStream_t stream, const GemmCall& call) {
  const int32_t tile_rows = sm100::ChooseTileRows(call.num_rows);
  const int64_t row_blocks = CeilDiv(call.num_rows, tile_rows);
  sm100::InputTiles inputs = {};
  inputs.x = call.x;
  inputs.rows = {nullptr, nullptr, call.num_rows};
  inputs.num_groups = call.num_groups;
  inputs.width = call.width;
  // The workspace holds a copy of the input as it is, if any product takes it so, and one rounded.
  bool plain = false, rounds = false, codes = true;
  for (const GemmSegment& segment : call.segments) {
    (segment.round_input ? rounds : plain) = true;
    codes = codes && (!segment.round_input || sm100::HasCodes(segment.format));
  }
  uint8_t* copies[2] = {call.workspace, call.workspace + (plain ? GemmCopyBytes(call) : 0)};
  for (const bool rounded : {false, true}) {
    if (!(rounded ? rounds : plain)) continue;
    inputs.tiles = copies[rounded];
    inputs.rounding = RoundingOf(rounded, codes);
    DSV4_CHECK(CudaStatus(LaunchInputs(stream, inputs, tile_rows, row_blocks)));
  }
  for (const GemmSegment& segment : call.segments) {
    sm100::DecodedGemm gemm = {};
    gemm.weights[0] = gemm.weights[1] = {segment.codes, segment.scales, segment.global_scale};
    gemm.inputs = copies[segment.round_input];
    gemm.rows = inputs.rows;
    gemm.num_outputs = segment.num_outputs;
    gemm.width = call.width;
    gemm.num_input_groups = call.num_groups;
    gemm.outputs_per_input_group = segment.num_outputs / call.num_groups;
    const bool as_codes = segment.round_input && codes;
    const Variant variant = {segment.format, as_codes ? Operands::kCodes : Operands::kBfloat16,
                             tile_rows};
    const int64_t tiles = row_blocks * CeilDiv(segment.num_outputs, 2 * kBlockRows);
    const int32_t cluster_size = sm100::ChooseClusterSize(
        tiles, CeilDiv(call.width, kBlockColumns), tile_rows, NumMultiprocessors());
    const sm100::StoreRows sink = {segment.output, segment.num_outputs, segment.float_output};
    DSV4_CHECK(CudaStatus(Launch(stream, variant, gemm, sink, tiles, cluster_size)));
  }
  return ffi::Error::Success();
}

namespace {

// Consecutive pieces of a workspace, each aligned to 256 bytes; without memory it only counts.
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<uint8_t*>(memory)) {}

  template <typename T>
  T* Take(int64_t count) {
    uint8_t* piece = memory_ == nullptr ? nullptr : memory_ + num_bytes_;
    num_bytes_ += CeilDiv(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return reinterpret_cast<T*>(piece);
  }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  uint8_t* memory_;
  int64_t num_bytes_ = 0;
};

// The arrays of a call with routed or sorted rows.
struct ExpertArrays {
  sm100::ExpertRows rows;
  uint8_t* hidden;  // tiles
  uint8_t* inputs;  // tiles, later the down projections' outputs
  int64_t num_bytes;

  ExpertArrays(const sm100::ExpertRows& call, int64_t hidden_width, int64_t width, void* memory)
      : rows(call) {
    const int64_t num_rows = int64_t{call.num_tokens} * call.top_k;
    Pieces pieces(memory);
    rows.blocks = pieces.Take<sm100::RowBlock>(
        sm100::MaxRowBlocks(num_rows, call.num_experts, call.tile_rows));
    rows.num_blocks = pieces.Take<int32_t>(1);
    rows.source_of_row = pieces.Take<int32_t>(num_rows);
    rows.weight_of_row = pieces.Take<float>(num_rows);
    rows.row_of_route = pieces.Take<int32_t>(num_rows);
    hidden = pieces.Take<uint8_t>(2 * num_rows * hidden_width);
    inputs = pieces.Take<uint8_t>(2 * num_rows * width);
    num_bytes = pieces.num_bytes();
  }
};

ffi::Error CheckExperts(const ExpertArrays& arrays, WeightFormat format, int64_t d, int64_t f,
                        const ExpertWorkspace& workspace) {
  DSV4_CHECK(ExpectMultiple("d", d, kBlockColumns));
  DSV4_CHECK(ExpectMultiple("f", f, kBlockColumns));
  if (format == WeightFormat::kBf16) return Invalid("weight_format", "bf16", "a packed format");
  if (arrays.rows.num_experts > sm100::kPlanThreads) {
    return Invalid("experts", std::to_string(arrays.rows.num_experts),
                   "at most " + std::to_string(sm100::kPlanThreads));
  }
  if (workspace.num_bytes < arrays.num_bytes) {
    return Invalid("workspace", std::to_string(workspace.num_bytes) + " bytes",
                   std::to_string(arrays.num_bytes) + " or more");
  }
  return ffi::Error::Success();
}

// Rows of the experts that are hit if routes fall evenly.
int32_t TileRows(int64_t num_rows, int64_t num_experts) {
  const int64_t hit = std::max<int64_t>(1, std::min(num_rows, num_experts));
  return sm100::ChooseTileRows(CeilDiv(num_rows, hit));
}

sm100::TiledMatrix MatrixOf(const ExpertWeight& weight) {
  return {weight.codes, weight.scales, weight.global_scale};
}

sm100::DecodedGemm ProductOf(const ExpertWeight& first, const ExpertWeight& second,
                             const uint8_t* inputs, const sm100::RowBlocks& rows, int outputs,
                             int width) {
  return {{MatrixOf(first), MatrixOf(second)}, inputs, rows, outputs, width, 1, outputs};
}

}  // namespace

ffi::Error LaunchMoeSm100(cudaStream_t stream, const MoeCall& call,
                          const ExpertWorkspace& workspace) {
  const int64_t num_rows = int64_t{call.num_tokens} * call.top_k;
  const int32_t tile_rows = TileRows(num_rows, call.num_experts);
  const ExpertArrays arrays({call.expert_ids, call.valid, call.weights, nullptr, call.num_tokens,
                             call.top_k, call.num_experts, tile_rows},
                            call.f, call.d, workspace.memory);
  DSV4_CHECK(CheckExperts(arrays, call.format, call.d, call.f, workspace));
  if (num_rows == 0) return ffi::Error::Success();
  const int64_t row_blocks = sm100::MaxRowBlocks(num_rows, call.num_experts, tile_rows);
  const bool codes = call.round_input && sm100::HasCodes(call.format);
  const Variant variant = {call.format, codes ? Operands::kCodes : Operands::kBfloat16, tile_rows};
  const sm100::RowBlocks rows = {arrays.rows.blocks, arrays.rows.num_blocks,
                                 static_cast<int32_t>(num_rows)};
  const Rounding rounding = RoundingOf(call.round_input, codes);

  sm100::PlanExperts<<<1, sm100::kPlanThreads, 0, stream>>>(arrays.rows);
  DSV4_CHECK(CudaStatus(cudaGetLastError()));
  const sm100::InputTiles inputs = {call.x, arrays.rows.source_of_row, arrays.inputs, rows, 1,
                                    call.d, rounding};
  DSV4_CHECK(CudaStatus(LaunchInputs(stream, inputs, tile_rows, row_blocks)));
  const sm100::StoreHidden hidden = {arrays.hidden, arrays.rows.weight_of_row, call.f, call.limit};
  DSV4_CHECK(CudaStatus(
      Launch(stream, variant, ProductOf(call.gate, call.up, arrays.inputs, rows, call.f, call.d),
             hidden, row_blocks * (call.f / kBlockRows), 1)));
  if (call.round_input) {
    const sm100::InputTiles again = {nullptr, nullptr, arrays.hidden, rows, 1, call.f, rounding};
    DSV4_CHECK(CudaStatus(LaunchInputs(stream, again, tile_rows, row_blocks)));
  }
  auto* y = reinterpret_cast<uint16_t*>(arrays.inputs);
  const sm100::StoreRows down = {y, call.d, false};
  DSV4_CHECK(CudaStatus(
      Launch(stream, variant, ProductOf(call.down, call.down, arrays.hidden, rows, call.d, call.f),
             down, row_blocks * CeilDiv(call.d, 2 * kBlockRows), 1)));
  const sm100::RouteSums sums = {y, arrays.rows.row_of_route, call.out, call.num_tokens,
                                 call.top_k, call.d};
  const int64_t items = int64_t{call.num_tokens} * call.d / sm100::kSumColumns;
  sm100::SumRoutes<<<CeilDiv(items, sm100::kSumThreads), sm100::kSumThreads, 0, stream>>>(sums);
  return CudaStatus(cudaGetLastError());
}

ffi::Error LaunchGroupedGemmSm100(cudaStream_t stream, const GroupedGemmCall& call,
                                  const ExpertWorkspace& workspace) {
  const int32_t tile_rows = TileRows(call.num_rows, call.num_experts);
  const ExpertArrays arrays({nullptr, nullptr, nullptr, call.group_sizes, call.num_rows, 1,
                             call.num_experts, tile_rows},
                            0, call.inputs, workspace.memory);
  DSV4_CHECK(CheckExperts(arrays, call.format, call.outputs, call.inputs, workspace));
  if (call.num_rows == 0) return ffi::Error::Success();
  const int64_t row_blocks = sm100::MaxRowBlocks(call.num_rows, call.num_experts, tile_rows);
  const bool codes = call.round_input && sm100::HasCodes(call.format);
  const Variant variant = {call.format, codes ? Operands::kCodes : Operands::kBfloat16, tile_rows};
  const sm100::RowBlocks rows = {arrays.rows.blocks, arrays.rows.num_blocks, call.num_rows};

  sm100::PlanExperts<<<1, sm100::kPlanThreads, 0, stream>>>(arrays.rows);
  DSV4_CHECK(CudaStatus(cudaGetLastError()));
  const sm100::InputTiles inputs = {call.x, nullptr,     arrays.inputs,
                                    rows,   1,           call.inputs,
                                    RoundingOf(call.round_input, codes)};
  DSV4_CHECK(CudaStatus(LaunchInputs(stream, inputs, tile_rows, row_blocks)));
  const sm100::StoreRows sink = {call.out, call.outputs, false};
  DSV4_CHECK(CudaStatus(Launch(
      stream, variant,
      ProductOf(call.weight, call.weight, arrays.inputs, rows, call.outputs, call.inputs), sink,
      row_blocks * CeilDiv(call.outputs, 2 * kBlockRows), 1)));
  sm100::ClearUnusedRows<<<NumMultiprocessors(), sm100::kSumThreads, 0, stream>>>(
      arrays.rows.blocks, arrays.rows.num_blocks, call.out, call.num_rows, call.outputs);
  return CudaStatus(cudaGetLastError());
}

}  // namespace dsv4
