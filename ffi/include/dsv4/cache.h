// How entries of the caches are kept, and the checks of their planes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "dsv4/ffi.h"
#include "dsv4/formats.h"

namespace dsv4 {

constexpr int kHeadDim = 512, kRopeDim = 64, kNopeDim = kHeadDim - kRopeDim, kKeyDim = 128;
constexpr int kRopePairs = kRopeDim / 2;
// Channels that share a scale.
constexpr int kRecordGroup = 64, kKeyGroup = 32;
constexpr int kRecordGroups = kNopeDim / kRecordGroup, kRecordScaleBytes = 8;
constexpr int kRecordBytes = kNopeDim + 2 * kRopeDim;
// Of the largest magnitude of channels that share a scale.
constexpr float kRecordFloor = 1e-4f, kKeyFloor = 6.0f * 0x1p-126f;
constexpr float kSmallestNormal = 0x1p-126f;

// Planes of an entry of w channels:
//   kDense:      w bfloat16
//   kRecord:     448 E4M3 codes and 64 bfloat16, 7 E8M0 scales and a zero byte
//   kFloatScale: 448 E4M3 codes and 64 bfloat16, one float32 scale
//   kMxfp4:      w / 2 bytes of E2M1 pairs, w / 32 E8M0 scales
enum class EntryFormat { kDense, kRecord, kFloatScale, kMxfp4 };

struct EntryPlanes {
  EntryFormat format;
  uint8_t* body;
  uint8_t* scales;
};

// What a format takes of each plane for an entry, in bytes.
DSV4_HOST_DEVICE constexpr int64_t BodyBytes(EntryFormat format, int width) {
  return format == EntryFormat::kDense ? 2 * width
         : format == EntryFormat::kMxfp4 ? width / 2
                                         : kRecordBytes;
}
DSV4_HOST_DEVICE constexpr int64_t ScaleBytes(EntryFormat format, int width) {
  return format == EntryFormat::kDense       ? 0
         : format == EntryFormat::kMxfp4     ? width / kKeyGroup
         : format == EntryFormat::kFloatScale ? 4
                                              : kRecordScaleBytes;
}

// The row of the planes [layer, block, entry, .] in which entry `id` of a sequence lies; -1 if it
// has no block.
DSV4_HOST_DEVICE int64_t EntryRow(const int32_t* blocks, int table_width, int64_t layer,
                                  int num_blocks, int per_block, int id) {
  const int column = id / per_block;
  if (id < 0 || column >= table_width) return -1;
  const int block = blocks[column];
  if (block < 0 || block >= num_blocks) return -1;
  return (layer * num_blocks + block) * per_block + id % per_block;
}

// A power-of-two scale's inverse; not for codes 0, 254 and 255.
DSV4_HOST_DEVICE float InverseE8m0(uint32_t code) { return BitCast<float>((254u - code) << 23); }

// The E2M1 code of a value in a group with a scale.
DSV4_HOST_DEVICE uint32_t KeyCode(float x, uint32_t scale) {
  if (scale == 255u) return 7u;
  const float magnitude = BitCast<float>(BitCast<uint32_t>(x) & 0x7fffffffu);
  return EncodeE2m1(magnitude < kSmallestNormal ? 0.0f * x : x, DecodeE8m0(scale));
}

inline std::vector<ffi::AnyBuffer> Buffers(const ffi::RemainingArgs& arguments) {
  std::vector<ffi::AnyBuffer> found;
  for (size_t i = 0; i < arguments.size(); ++i) {
    found.push_back(arguments.get<ffi::AnyBuffer>(i).value());
  }
  return found;
}

inline std::vector<ffi::AnyBuffer> Buffers(const ffi::RemainingRets& results) {
  std::vector<ffi::AnyBuffer> found;
  for (size_t i = 0; i < results.size(); ++i) {
    found.push_back(*results.get<ffi::AnyBuffer>(i).value());
  }
  return found;
}

// The format and pointers of the planes of entries of `width` channels, whose first axes are
// `prefix`: one plane, or two.
inline ffi::Error CheckPlanes(const std::string& name, const std::vector<ffi::AnyBuffer>& planes,
                              std::initializer_list<int64_t> prefix, int width,
                              EntryPlanes* result) {
  using ffi::DataType;
  const bool two = planes.size() == 2;
  if (!two && planes.size() != 1) return Invalid(name, std::to_string(planes.size()), "1 or 2");
  const std::string body_name = name + ": body", scales_name = name + ": scales";
  const bool float_scale = two && planes[1].element_type() == DataType::F32;
  const EntryFormat format = !two               ? EntryFormat::kDense
                             : width == kKeyDim ? EntryFormat::kMxfp4
                             : float_scale      ? EntryFormat::kFloatScale
                                                : EntryFormat::kRecord;
  DSV4_CHECK(ExpectDtype(body_name.c_str(), planes[0], {two ? DataType::U8 : DataType::BF16}));
  if (two && !float_scale) {
    DSV4_CHECK(ExpectDtype(scales_name.c_str(), planes[1], {DataType::U8}));
  }
  for (size_t plane = 0; plane < planes.size(); ++plane) {
    std::vector<int64_t> expected(prefix);
    const int64_t elements = plane == 0 ? BodyBytes(format, width) / (two ? 1 : 2)
                                        : ScaleBytes(format, width) / (float_scale ? 4 : 1);
    expected.push_back(elements);
    auto found = planes[plane].dimensions();
    bool same = found.size() == expected.size();
    for (size_t axis = 0; same && axis < expected.size(); ++axis) {
      same = expected[axis] == kAnySize || expected[axis] == found[axis];
    }
    if (!same) return Invalid(name, "shape " + ShapeText(found), ShapeText(expected));
  }
  DSV4_CHECK(ExpectAligned(body_name.c_str(), planes[0], 16));
  *result = {format, static_cast<uint8_t*>(planes[0].untyped_data()),
             two ? static_cast<uint8_t*>(planes[1].untyped_data()) : nullptr};
  return ffi::Error::Success();
}

// A norm's weight, bfloat16 or float32.
struct NormWeight {
  const void* values;
  bool is_float;

  DSV4_HOST_DEVICE float operator[](int i) const {
    return is_float ? static_cast<const float*>(values)[i]
                    : FromBfloat16(static_cast<const uint16_t*>(values)[i]);
  }
};

inline ffi::Error CheckNormWeight(const char* name, const ffi::AnyBuffer& weight, int64_t width,
                                  NormWeight* result) {
  DSV4_CHECK(ExpectDtype(name, weight, {ffi::DataType::BF16, ffi::DataType::F32}));
  DSV4_CHECK(ExpectShape(name, weight, {width}));
  *result = {weight.untyped_data(), weight.element_type() == ffi::DataType::F32};
  return ffi::Error::Success();
}

inline ffi::Error CheckLayer(int64_t layer, int64_t num_layers) {
  if (layer >= 0 && layer < num_layers) return ffi::Error::Success();
  return Invalid("layer", std::to_string(layer), "0 to " + std::to_string(num_layers - 1));
}

}  // namespace dsv4
