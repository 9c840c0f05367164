// The launchers of products with tiled weights, called with plain pointers; null, or the error's
// message.
#include "decoded_launch_sm100.cuh"

namespace {

const char* Message(const dsv4::ffi::Error& error) {
  static std::string message;
  message = error.message();
  return error.failure() ? message.c_str() : nullptr;
}

const uint8_t* Bytes(const void* pointer) { return static_cast<const uint8_t*>(pointer); }

dsv4::ExpertWeight Weight(const void* const* arrays) {
  return {Bytes(arrays[0]), Bytes(arrays[1]), static_cast<const float*>(arrays[2])};
}

}  // namespace

// `arrays`: codes, scales and global scale of each segment, then its output.
extern "C" const char* launch_gemm(const void* x, int num_rows, int num_groups, int width,
                                   int num_segments, const int* formats, const int* rounded,
                                   const int* outputs, const void* const* arrays,
                                   void* workspace) {
  dsv4::GemmCall call = {static_cast<const uint16_t*>(x), num_rows, num_groups, width, {},
                         static_cast<uint8_t*>(workspace)};
  for (int i = 0; i < num_segments; ++i, arrays += 4) {
    call.segments.push_back({static_cast<dsv4::WeightFormat>(formats[i]), rounded[i] != 0, true,
                             outputs[i], Bytes(arrays[0]), Bytes(arrays[1]),
                             static_cast<const float*>(arrays[2]),
                             const_cast<void*>(arrays[3])});
  }
  return Message(dsv4::LaunchGemmSm100(nullptr, call));
}

// `arrays`: x, routing weights, expert ids, valid, three for each of gate, up and down, out.
extern "C" const char* launch_moe(int format, const void* const* arrays, int num_tokens, int top_k,
                                  int num_experts, int d, int f, float limit, bool round_input,
                                  void* workspace, int64_t workspace_bytes) {
  const dsv4::MoeCall call = {static_cast<dsv4::WeightFormat>(format),
                              static_cast<const uint16_t*>(arrays[0]),
                              static_cast<const float*>(arrays[1]),
                              static_cast<const int32_t*>(arrays[2]),
                              static_cast<const bool*>(arrays[3]),
                              Weight(arrays + 4),
                              Weight(arrays + 7),
                              Weight(arrays + 10),
                              static_cast<float*>(const_cast<void*>(arrays[13])),
                              num_tokens,
                              top_k,
                              num_experts,
                              d,
                              f,
                              limit,
                              round_input};
  return Message(dsv4::LaunchMoeSm100(nullptr, call, {workspace, workspace_bytes}));
}

// `arrays`: x, group sizes, the weight's three, out.
extern "C" const char* launch_grouped(int format, const void* const* arrays, int num_rows,
                                      int num_experts, int inputs, int outputs, bool round_input,
                                      void* workspace, int64_t workspace_bytes) {
  const dsv4::GroupedGemmCall call = {static_cast<dsv4::WeightFormat>(format),
                                      static_cast<const uint16_t*>(arrays[0]),
                                      static_cast<const int32_t*>(arrays[1]),
                                      Weight(arrays + 2),
                                      static_cast<uint16_t*>(const_cast<void*>(arrays[5])),
                                      num_rows,
                                      num_experts,
                                      inputs,
                                      outputs,
                                      round_input};
  return Message(dsv4::LaunchGroupedGemmSm100(nullptr, call, {workspace, workspace_bytes}));
}
