// Workspace and launches of the expert kernels.
#pragma once

#include <algorithm>

#include "moe_kernel.cuh"
#include "moe_routes.cuh"

namespace dsv4 {

// Consecutive pieces of a workspace, each aligned to 256 bytes; without memory it only counts.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<uint8_t*>(memory)) {}

  template <typename T>
  T* Take(int64_t count) {
    uint8_t* piece = memory_ == nullptr ? nullptr : memory_ + num_bytes_;
    num_bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return reinterpret_cast<T*>(piece);
  }

  int64_t num_bytes() const { return num_bytes_; }

 private:
  uint8_t* memory_;
  int64_t num_bytes_ = 0;
};

struct ExpertCall {
  Routing routing;
  const uint16_t* x;  // bfloat16 [num_tokens, d]
  Weight gate, up, down;
  ExpertMatrices shared;  // in FP8, of all tokens; or null
  float* out;             // [num_tokens, d], or
  uint16_t* y;  // [num_tokens, d] of grouped products
  int d, f;
  float limit;
  bool quantize;
};

// The parts of a workspace for blocks of at least `rows_per_block` rows.
inline void LayOut(const ExpertCall& call, int rows_per_block, bool reorder, Workspace& workspace,
                   Preparation& preparation, MoeProblem& problem) {
  const Routing& r = call.routing;
  bool whole = call.out != nullptr;
  int64_t rows = int64_t{r.num_tokens} * r.top_k;
  int64_t blocks = rows / rows_per_block + std::min<int64_t>(rows, r.num_experts);
  int64_t columns = call.d / 64;
  Plan& plan = preparation.plan;
  plan.num_counters = kCounterPitch + 2 * blocks + columns;
  plan.counters = workspace.Take<int>(plan.num_counters);
  plan.num_blocks = workspace.Take<int>(1);
  plan.blocks = workspace.Take<RowBlock>(blocks);
  plan.source_of_row = workspace.Take<int>(rows);
  plan.weight_of_row = workspace.Take<float>(rows);
  plan.row_of_route = workspace.Take<int>(rows);
  int width = whole ? call.d : call.f;
  auto* ordered = workspace.Take<uint16_t>(int64_t{r.num_tokens} * width);
  preparation.routing = r;
  preparation.x = call.x;
  preparation.ordered = ordered;
  preparation.unused_rows = call.y;
  preparation.width = width;
  preparation.outputs = call.d;
  preparation.rows_per_block = rows_per_block;
  preparation.quantize = call.quantize;
  preparation.reorder = reorder;

  problem = {plan, call.gate, call.up, call.down, ordered, ordered, call.y, call.out};
  if (whole) {
    problem.hidden = workspace.Take<uint16_t>(rows * call.f);
    problem.y = workspace.Take<uint16_t>(rows * call.d);
  }
  problem.next_item = plan.counters;
  problem.hidden_done = plan.counters + kCounterPitch;
  problem.rounded = problem.hidden_done + blocks;
  problem.columns_done = problem.rounded + blocks;
  problem.num_tokens = r.num_tokens;
  problem.top_k = r.top_k;
  problem.d = call.d;
  problem.f = call.f;
  problem.limit = call.limit;
  problem.quantize = call.quantize;
}

// Without memory and stages.
inline RouteProblem RoutesOf(const ExpertCall& call) {
  RouteProblem problem = {};
  problem.routing = call.routing;
  problem.routed = {call.gate, call.up, call.down};
  problem.shared = call.shared;
  problem.x = call.x;
  problem.out = call.out;
  problem.num_shared = call.shared.gate.codes == nullptr ? 0 : call.routing.num_tokens;
  problem.d = call.d;
  problem.f = call.f;
  problem.limit = call.limit;
  problem.quantize = call.quantize;
  return problem;
}

// Returns the number of counters.
inline int LayOutRoutes(Workspace& workspace, RouteProblem& problem) {
  const int num_rows = MaxRouteRows(problem), num_counters = 1 + num_rows;
  problem.next_item = workspace.Take<int>(kCounterPitch * num_counters);
  problem.hidden_done = problem.next_item + kCounterPitch;
  problem.gate_up = workspace.Take<uint16_t>(2 * int64_t{num_rows} * problem.f);
  return num_counters;
}

// Of any kernel: the smallest blocks of rows, and a copy of x.
inline int64_t WorkspaceBytes(const ExpertCall& call) {
  Workspace workspace(nullptr);
  Preparation preparation;
  MoeProblem problem;
  LayOut(call, kFewestRows, true, workspace, preparation, problem);
  if (call.out == nullptr) return workspace.num_bytes();
  RouteProblem routes = RoutesOf(call);
  Workspace of_routes(nullptr);
  LayOutRoutes(of_routes, routes);
  return std::max(workspace.num_bytes(), of_routes.num_bytes());
}

// Of experts that are hit if routes fall evenly.
inline int MeanRows(const ExpertCall& call) {
  int rows = call.routing.num_tokens * call.routing.top_k;
  return rows / std::max(1, std::min(rows, call.routing.num_experts));
}

inline int NumMultiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// A block for each multiprocessor, which may start before the kernel ahead of it has ended.
template <typename Problem>
cudaError_t LaunchAfter(cudaStream_t stream, void (*kernel)(const Problem), int num_threads,
                        int shared_bytes, const Problem& problem) {
  // Of the current device.
  cudaError_t configured =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (configured != cudaSuccess) return configured;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = NumMultiprocessors();
  config.blockDim = num_threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, problem);
}

template <typename Shape>
cudaError_t LaunchExperts(cudaStream_t stream, const ExpertCall& call, void* memory) {
  constexpr int kSharedBytes = sizeof(typename Shape::Shared);
  Workspace workspace(memory);
  Preparation preparation;
  MoeProblem problem;
  LayOut(call, Shape::kMaxRows, !Shape::kWarpProducts, workspace, preparation, problem);
  int64_t groups = int64_t{call.routing.num_tokens} * preparation.width / kBlockColumns;
  constexpr int kGroupsPerBlock = kPrepareThreads / kWarp;
  int order_blocks = std::min<int64_t>((groups + kGroupsPerBlock - 1) / kGroupsPerBlock,
                                       4 * NumMultiprocessors());
  size_t plan_bytes = 2 * sizeof(int) * call.routing.num_experts;
  Prepare<<<1 + order_blocks, kPrepareThreads, plan_bytes, stream>>>(preparation);

  return LaunchAfter(stream, Moe<Shape>, kMoeThreads, kSharedBytes, problem);
}

inline bool AreFew(const RouteProblem& problem) {
  const Routing& r = problem.routing;
  return problem.out != nullptr && int64_t{r.num_tokens} * (r.top_k + 1) <= kMaxRouteRows &&
         RowBytes(problem) <= kMaxRowBytes;
}

template <WeightFormat format>
cudaError_t LaunchRoutes(cudaStream_t stream, RouteProblem& problem, void* memory) {
  problem.num_stages = kMostRouteStages;
  while (RouteSharedBytes<format>(problem) > kMaxRouteSharedBytes) --problem.num_stages;
  Workspace workspace(memory);
  const int num_counters = LayOutRoutes(workspace, problem);
  const int num_outputs = problem.routing.num_tokens * problem.d;
  const int clear_blocks = (num_outputs / 4 + kClearThreads - 1) / kClearThreads;
  ClearRoutes<<<clear_blocks, kClearThreads, 0, stream>>>(problem.next_item, num_counters,
                                                          problem.out, num_outputs);
  return LaunchAfter(stream, MoeRoutes<format>, kRouteThreads, RouteSharedBytes<format>(problem),
                     problem);
}

}  // namespace dsv4
