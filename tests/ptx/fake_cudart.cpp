// Stands in for the CUDA runtime, so that the host code of a launch runs without a GPU: tensor
// maps get the emulator's encoding, a launch is recorded and not executed. Device pointers are
// never followed, so they may be the emulator's addresses.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

struct Recorded {
  std::string kernel;
  uint32_t grid[3], block[3], cluster[3];
  uint64_t shared_bytes;
  std::vector<uint8_t> parameters;
};

struct PushedConfiguration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};

// Kernels are registered while libraries are loaded, perhaps before this one's globals exist.
std::map<const void*, std::string>& KernelNames() {
  static std::map<const void*, std::string> names;
  return names;
}

struct Parameters {
  std::vector<int64_t> offsets, sizes;
};

std::map<std::string, Parameters> parameters_of_kernel;  // the test's, from the PTX
PushedConfiguration pushed;
std::vector<Recorded> recorded;

void Record(const void* function, dim3 grid, dim3 block, dim3 cluster, size_t shared_bytes,
            void** arguments) {
  recorded.push_back({KernelNames()[function],
                      {grid.x, grid.y, grid.z},
                      {block.x, block.y, block.z},
                      {cluster.x, cluster.y, cluster.z},
                      shared_bytes,
                      {}});
  const Parameters& parameters = parameters_of_kernel[recorded.back().kernel];
  std::vector<uint8_t>& bytes = recorded.back().parameters;
  for (size_t i = 0; i < parameters.sizes.size(); ++i) {
    bytes.resize(parameters.offsets[i] + parameters.sizes[i]);
    std::memcpy(bytes.data() + parameters.offsets[i], arguments[i], parameters.sizes[i]);
  }
}

CUresult EncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                     const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                     const cuuint32_t* /*steps*/, CUtensorMapInterleave,
                     CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                     CUtensorMapFloatOOBfill) {
  // Of CUtensorMapDataType, in its order.
  static const uint8_t kBits[] = {8, 16, 32, 32, 64, 64, 16, 32, 64, 16, 32, 32, 32, 4, 4, 6};
  const uint64_t magic = 0x70616D5F726F736Eull, start = reinterpret_cast<uint64_t>(address);
  const uint8_t kinds[] = {static_cast<uint8_t>(rank), kBits[type], static_cast<uint8_t>(swizzle)};
  uint64_t wide_sizes[5] = {}, wide_strides[4] = {};
  uint16_t narrow_box[5] = {};
  for (cuuint32_t i = 0; i < rank; ++i) {
    wide_sizes[i] = sizes[i];
    narrow_box[i] = static_cast<uint16_t>(box[i]);
    if (i > 0) wide_strides[i - 1] = strides[i - 1];
  }
  auto* bytes = reinterpret_cast<uint8_t*>(map);
  std::memset(bytes, 0, sizeof(*map));
  std::memcpy(bytes, &magic, 8);
  std::memcpy(bytes + 8, &start, 8);
  std::memcpy(bytes + 16, kinds, 3);
  std::memcpy(bytes + 24, wide_sizes, 40);
  std::memcpy(bytes + 64, wide_strides, 32);
  std::memcpy(bytes + 96, narrow_box, 10);
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

// For the test.
void expect_parameters(const char* kernel, int count, const int64_t* offsets,
                       const int64_t* sizes) {
  parameters_of_kernel[kernel] = {{offsets, offsets + count}, {sizes, sizes + count}};
}
void forget_launches() { recorded.clear(); }
int launches() { return static_cast<int>(recorded.size()); }
const char* launched_kernel(int launch) { return recorded[launch].kernel.c_str(); }
const uint8_t* launched_parameters(int launch) { return recorded[launch].parameters.data(); }
void launched_shape(int launch, int64_t* shape) {
  for (int i = 0; i < 3; ++i) {
    shape[i] = recorded[launch].grid[i];
    shape[3 + i] = recorded[launch].block[i];
    shape[6 + i] = recorded[launch].cluster[i];
  }
  shape[9] = recorded[launch].shared_bytes;
}

// What nvcc's host code calls.
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  KernelNames()[host] = device;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes,
                                     cudaStream_t stream) {
  pushed = {grid, block, shared_bytes, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                       void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared_bytes = pushed.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared_bytes, cudaStream_t) {
  Record(kernel, grid, block, dim3(1, 1, 1), shared_bytes, arguments);
  return cudaSuccess;
}

// The runtime.
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  Record(function, grid, block, dim3(1, 1, 1), shared_bytes, arguments);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  dim3 cluster(1, 1, 1);
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      cluster = dim3(attribute.val.clusterDim.x, attribute.val.clusterDim.y,
                     attribute.val.clusterDim.z);
    }
  }
  Record(function, config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes,
         arguments);
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** entry, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool found = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *entry = found ? reinterpret_cast<void*>(EncodeTiled) : nullptr;
  *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 4; break;
    default: *value = 227 * 1024; break;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the stand-in"; }
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int,
                                                                   size_t, unsigned) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t*) {
  *count = 4;
  return cudaSuccess;
}

}  // extern "C"
