// Products with one tiled weight, one output after another.
#pragma once

#include <vector>

#include "dsv4/gemm_segment.h"
#include "tile_values.h"

namespace dsv4 {

// x [rows, groups, width]; equal runs of outputs read one group each.
inline void MultiplyRows(const GemmSegment& segment, const float* x, int64_t num_rows,
                         int64_t num_groups, int64_t width) {
  const TileValues tiles(segment.format, segment.codes, segment.scales, width);
  const int64_t outputs_per_group = segment.num_outputs / num_groups;
  std::vector<float> weights(width);
  for (int64_t n = 0; n < segment.num_outputs; ++n) {
    for (int64_t k = 0; k < width; ++k) weights[k] = tiles.At(n, k);
    for (int64_t row = 0; row < num_rows; ++row) {
      const float* input = x + (row * num_groups + n / outputs_per_group) * width;
      double sum = 0;
      for (int64_t k = 0; k < width; ++k) sum += double{input[k]} * weights[k];
      const float y = static_cast<float>(sum * *segment.global_scale);
      const int64_t index = row * segment.num_outputs + n;
      if (segment.float_output) {
        static_cast<float*>(segment.output)[index] = y;
      } else {
        static_cast<uint16_t*>(segment.output)[index] = ToBfloat16(y);
      }
    }
  }
}

}  // namespace dsv4
