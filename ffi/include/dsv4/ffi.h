// XLA's FFI, and checks of buffers whose errors name the argument.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "xla/ffi/api/ffi.h"

// 1000 * major + minor. A runtime with an older minor version refuses the handlers.
extern "C" inline __attribute__((used)) int dsv4_ffi_api_version() {
  return 1000 * XLA_FFI_API_MAJOR + XLA_FFI_API_MINOR;
}

#ifdef __CUDACC__
#include <cuda_runtime.h>
extern "C" inline __attribute__((used)) int dsv4_cuda_version() { return CUDART_VERSION; }
#endif

// Returns from a handler with the error of `expression`, if it is one.
#define DSV4_CHECK(expression)                                      \
  do {                                                              \
    if (xla::ffi::Error error = (expression); error.failure()) {    \
      return error;                                                 \
    }                                                               \
  } while (false)

namespace dsv4 {

namespace ffi = xla::ffi;

constexpr int64_t kAnySize = -1;

inline ffi::Error Invalid(const std::string& name, const std::string& got,
                          const std::string& expected) {
  return ffi::Error::InvalidArgument(name + ": got " + got + ", expected " + expected);
}

template <typename Sizes>
std::string ShapeText(const Sizes& sizes) {
  std::string text;
  for (int64_t size : sizes) {
    text += (text.empty() ? "" : ", ") + (size == kAnySize ? "any" : std::to_string(size));
  }
  return "[" + text + "]";
}

inline ffi::Error ExpectShape(const char* name, const ffi::AnyBuffer& buffer,
                              std::initializer_list<int64_t> expected) {
  auto found = buffer.dimensions();
  bool same = found.size() == expected.size();
  const int64_t* size = found.begin();
  for (auto it = expected.begin(); same && it != expected.end(); ++it, ++size) {
    same = *it == kAnySize || *it == *size;
  }
  if (same) return ffi::Error::Success();
  return Invalid(name, "shape " + ShapeText(found), ShapeText(expected));
}

inline const char* DtypeText(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::PRED: return "bool";
    case ffi::DataType::S8: return "int8";
    case ffi::DataType::U8: return "uint8";
    case ffi::DataType::S32: return "int32";
    case ffi::DataType::U32: return "uint32";
    case ffi::DataType::S64: return "int64";
    case ffi::DataType::F16: return "float16";
    case ffi::DataType::BF16: return "bfloat16";
    case ffi::DataType::F32: return "float32";
    case ffi::DataType::F64: return "float64";
    case ffi::DataType::F8E4M3FN: return "float8_e4m3fn";
    default: return "another dtype";
  }
}

inline ffi::Error ExpectDtype(const char* name, const ffi::AnyBuffer& buffer,
                              std::initializer_list<ffi::DataType> expected) {
  std::string names;
  for (ffi::DataType dtype : expected) {
    if (dtype == buffer.element_type()) return ffi::Error::Success();
    names += (names.empty() ? "" : " or ") + std::string(DtypeText(dtype));
  }
  return Invalid(name, DtypeText(buffer.element_type()), names);
}

// A buffer of one dtype and shape; the usual check of an argument.
inline ffi::Error Expect(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType dtype,
                         std::initializer_list<int64_t> shape) {
  DSV4_CHECK(ExpectDtype(name, buffer, {dtype}));
  return ExpectShape(name, buffer, shape);
}

inline ffi::Error ExpectMultiple(const char* name, int64_t size, int64_t divisor) {
  if (size % divisor == 0) return ffi::Error::Success();
  return Invalid(name, std::to_string(size), "a multiple of " + std::to_string(divisor));
}

inline ffi::Error ExpectAligned(const char* name, const ffi::AnyBuffer& buffer,
                                uintptr_t num_bytes) {
  uintptr_t address = reinterpret_cast<uintptr_t>(buffer.untyped_data());
  if (address % num_bytes == 0) return ffi::Error::Success();
  return Invalid(name, "an address that is " + std::to_string(address % num_bytes) +
                           " past a multiple of " + std::to_string(num_bytes),
                 "an aligned one");
}

#ifdef __CUDACC__
// What a launch reports; the handler returns it.
inline ffi::Error CudaStatus(cudaError_t status) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(cudaGetErrorString(status));
}
#endif

}  // namespace dsv4
