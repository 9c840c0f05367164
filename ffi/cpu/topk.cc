#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "dsv4/topk.h"

namespace dsv4 {
namespace {

// Larger is better: scores in their order, NaN below them, and the lower index among equals.
uint64_t Rank(float score, int64_t index) {
  uint32_t key = 0;
  if (!std::isnan(score)) {
    std::memcpy(&key, &score, sizeof(key));
    if (key == 0x80000000u) key = 0;
    key = key & 0x80000000u ? ~key : key | 0x80000000u;
  }
  return uint64_t{key} << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(index));
}

int64_t IndexOf(uint64_t rank) { return 0xFFFFFFFFu - static_cast<uint32_t>(rank); }

ffi::Error TopkSelect(ffi::AnyBuffer scores, ffi::AnyBuffer lengths,
                      ffi::Result<ffi::AnyBuffer> values, ffi::Result<ffi::AnyBuffer> indices,
                      bool sorted) {
  DSV4_CHECK(CheckTopkSelect(scores, lengths, *values, *indices));
  const int64_t n = scores.dimensions().back(), k = values->dimensions().back();
  const int64_t rows = static_cast<int64_t>(scores.element_count()) / n;
  const bool all = lengths.element_count() == 0;
  std::vector<uint64_t> ranks;
  for (int64_t row = 0; row < rows; ++row) {
    const float* x = scores.typed_data<float>() + row * n;
    const int64_t length =
        all ? n : std::clamp<int64_t>(lengths.typed_data<int32_t>()[row], int64_t{0}, n);
    ranks.resize(length);
    for (int64_t i = 0; i < length; ++i) ranks[i] = Rank(x[i], i);
    const int64_t count = std::min(k, length);
    const auto end = ranks.begin() + count;
    std::nth_element(ranks.begin(), end, ranks.end(), std::greater<>());
    if (sorted) {
      std::sort(ranks.begin(), end, std::greater<>());
    } else {
      std::sort(ranks.begin(), end,
                [](uint64_t a, uint64_t b) { return IndexOf(a) < IndexOf(b); });
    }
    for (int64_t i = 0; i < k; ++i) {
      const bool found = i < count;
      const int64_t index = found ? IndexOf(ranks[i]) : -1;
      indices->typed_data<int32_t>()[row * k + i] = static_cast<int32_t>(index);
      values->typed_data<float>()[row * k + i] =
          found ? x[index] : -std::numeric_limits<float>::infinity();
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_topk_select, TopkSelect,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("sorted"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
