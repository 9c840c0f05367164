// The launcher of the NVFP4 kernel, called with plain pointers; null, or the error's message.
#include "nvfp4_launch_sm100.cuh"

extern "C" const char* launch_nvfp4(const void* tokens, const void* token_scales,
                                    const void* token_global_scales, const void* weights,
                                    const void* weight_scales, const void* weight_global_scales,
                                    const void* group_sizes, void* out, int64_t num_tokens,
                                    int64_t num_features, int64_t width, int64_t num_groups) {
  static std::string message;
  auto operand = [](const void* codes, const void* scales, const void* global_scales) {
    return dsv4::Nvfp4Operand{static_cast<const uint8_t*>(codes),
                              static_cast<const uint8_t*>(scales),
                              static_cast<const float*>(global_scales)};
  };
  const dsv4::Nvfp4GemmCall call = {
      operand(tokens, token_scales, token_global_scales),
      operand(weights, weight_scales, weight_global_scales),
      static_cast<const int32_t*>(group_sizes),
      num_tokens,
      num_features,
      width,
      num_groups,
      static_cast<uint16_t*>(out)};
  const dsv4::ffi::Error error = dsv4::LaunchNvfp4GemmSm100(nullptr, call);
  message = error.message();
  return error.failure() ? message.c_str() : nullptr;
}
