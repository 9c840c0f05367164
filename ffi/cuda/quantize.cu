// nvfp4_quantize: codes, swizzled block scales and global scales of a matrix, in one launch.
// Architectures: 90a 100f

#include <cooperative_groups.h>
#include <cuda_fp8.h>

#include <algorithm>

#include "dsv4/ffi.h"
#include "dsv4/nvfp4.h"
#include "dsv4/quantize.h"

namespace dsv4 {
namespace {

namespace cg = cooperative_groups;

// Who shares a global scale, and so must agree on the largest magnitude before any code is known.
enum class Scope { kRow, kCluster, kGrid };

constexpr int kClusterSize = 8, kMaxThreads = 1024;
// Groups that a thread keeps in registers between the two passes.
constexpr int kFew = 1;
template <typename T>
constexpr int kMany = 8 / sizeof(T);

template <typename T>
struct Arguments {
  const T* x;
  uint2* codes;
  uint8_t* scales;
  float* global_scale;
  uint32_t* block_amax;
  uint32_t num_rows, groups_per_row;
};

// As integers NaNs are above infinity and all numbers.
__device__ uint32_t Amax(const uint4 (&quads)[2], uint16_t) {
  uint32_t pair = 0;
#pragma unroll
  for (const uint4& quad : quads) {
    for (uint32_t word : {quad.x, quad.y, quad.z, quad.w}) {
      pair = __vmaxu2(pair, word & 0x7fff7fffu);
    }
  }
  return max(pair << 16, pair & 0xffff0000u);
}
__device__ uint32_t Amax(const uint4 (&quads)[4], float) {
  uint32_t amax = 0;
#pragma unroll
  for (const uint4& quad : quads) {
    for (uint32_t word : {quad.x, quad.y, quad.z, quad.w}) amax = max(amax, word & 0x7fffffffu);
  }
  return amax;
}

// The elements of one block scale.
template <typename T>
struct Group {
  static constexpr int kPerWord = 4 / sizeof(T);
  uint4 quads[sizeof(T)];

  __device__ const uint32_t* words() const { return reinterpret_cast<const uint32_t*>(quads); }

  __device__ float operator[](int i) const {
    uint32_t word = words()[i / kPerWord];
    if (kPerWord == 1) return __uint_as_float(word);
    return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
  }
};

__device__ uint32_t BlockMax(uint32_t value) {
  __shared__ uint32_t of_warps[kMaxThreads / 32];
  value = __reduce_max_sync(~0u, value);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x % 32 < blockDim.x / 32 ? of_warps[threadIdx.x % 32] : 0;
  return __reduce_max_sync(~0u, value);
}

template <Scope kScope>
__device__ uint32_t SharedMax(uint32_t value, uint32_t* block_amax) {
  value = BlockMax(value);
  if constexpr (kScope == Scope::kCluster) {
    __shared__ uint32_t of_blocks[kClusterSize];
    cg::cluster_group cluster = cg::this_cluster();
    cluster.barrier_wait();  // All blocks run, so that their shared memory can be written.
    if (threadIdx.x < kClusterSize) {
      *cluster.map_shared_rank(&of_blocks[cluster.block_rank()], threadIdx.x) = value;
    }
    cluster.sync();
    for (uint32_t other : of_blocks) value = max(value, other);
  }
  if constexpr (kScope == Scope::kGrid) {
    if (threadIdx.x == 0) block_amax[blockIdx.x] = value;
    cg::this_grid().sync();
    for (int i = threadIdx.x; i < gridDim.x; i += blockDim.x) value = max(value, block_amax[i]);
    value = BlockMax(value);
  }
  return value;
}

// Byte `byte` of each of four words.
__device__ uint32_t GatherBytes(int byte, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t pair = byte | (byte + 4) << 4;
  return __byte_perm(__byte_perm(a, b, pair), __byte_perm(c, d, pair), 0x5410);
}

// The signs of eight elements, each in the highest bit of its code.
__device__ uint32_t Signs(const uint32_t* words, uint16_t) {
  uint32_t even = GatherBytes(1, words[0], words[1], words[2], words[3]);
  uint32_t odd = GatherBytes(3, words[0], words[1], words[2], words[3]);
  return (even & 0x80808080u) >> 4 | (odd & 0x80808080u);
}
__device__ uint32_t Signs(const uint32_t* words, float) {
  uint32_t even = GatherBytes(3, words[0], words[2], words[4], words[6]);
  uint32_t odd = GatherBytes(3, words[1], words[3], words[5], words[7]);
  return (even & 0x80808080u) >> 4 | (odd & 0x80808080u);
}

__device__ float ApproximateReciprocal(float x) {
  float reciprocal;
  asm("rcp.approx.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
  return reciprocal;
}

// Codes by a product with 1 / unit, which is inexact: false if one of them is too near a tie to
// be sure. Code numbers are a concave function of the magnitude with three straight pieces.
template <typename T>
__device__ bool ProposeCodes(const Group<T>& group, float amax, float unit, uint2* codes) {
  constexpr float kToInteger = 8388608.0f;  // 2^23: its sums are integers, in the last bits.
  constexpr float kSure = 0.5f - 0x1p-17f;
  constexpr float kUnsaturated = 6.9f;
  const float inverse = ApproximateReciprocal(unit);
  float farthest = 0.0f;
  uint32_t halves[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float magnitude = fabsf(group[8 * half + i]);
      float code = fminf(magnitude * (2.0f * inverse), fmaf(magnitude, inverse, 2.0f));
      code = fminf(code, fmaf(magnitude, 0.5f * inverse, 4.0f));
      float rounded = code + kToInteger;
      farthest = fmaxf(farthest, fabsf(code - (rounded - kToInteger)));
      sum += __float_as_uint(rounded) << (4 * i);
    }
    const uint32_t bias = __float_as_uint(kToInteger);
    const uint32_t* words = group.words() + 8 / Group<T>::kPerWord * half;
    halves[half] = (sum - bias - (bias << 4)) | Signs(words, T{});
  }
  *codes = make_uint2(halves[0], halves[1]);
  return farthest < kSure && amax * inverse < kUnsaturated;
}

template <typename T>
__device__ __noinline__ uint2 ExactCodes(Group<T> group, float unit) {
  uint32_t halves[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kNvfp4Group; ++i) {
    halves[i / 8] |= EncodeE2m1(group[i], unit) << (i % 8 * 4);
  }
  return make_uint2(halves[0], halves[1]);
}

template <typename T>
__device__ void Store(const Arguments<T>& args, const Group<T>& group, float amax, uint32_t row,
                      uint32_t column, float global_scale, float inverse) {
  const uint32_t proposed = __nv_cvt_float_to_fp8(amax * inverse, __NV_SATFINITE, __NV_E4M3);
  const uint32_t scale = Nvfp4BlockScale(amax, global_scale, proposed);
  const float unit = Nvfp4Unit(scale, global_scale);
  uint2 codes;
  if (!ProposeCodes(group, amax, unit, &codes)) codes = ExactCodes(group, unit);
  args.codes[row * args.groups_per_row + column] = codes;

  const uint32_t blocks = (args.groups_per_row + 3) / kScaleBlockGroups;
  uint8_t* target = args.scales + SwizzledScaleOffset(row, column, blocks);
  *target = scale;
  if (column == args.groups_per_row - 1) {
    for (uint32_t padding = column % 4 + 1; padding < 4; ++padding) *++target = 0;
  }
}

// The scales of the rows that fill up the last block of rows.
template <typename T>
__device__ void ZeroPadding(const Arguments<T>& args) {
  const uint32_t blocks = (args.groups_per_row + 3) / kScaleBlockGroups;
  const uint32_t rows = -args.num_rows & (kScaleBlockRows - 1);
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < rows * blocks;
       i += gridDim.x * blockDim.x) {
    uint32_t offset = SwizzledScaleOffset(args.num_rows + i / blocks, i % blocks * 4, blocks);
    *reinterpret_cast<uint32_t*>(args.scales + offset) = 0;
  }
}

template <typename T, int kGroups, Scope kScope>
__global__ void __launch_bounds__(kScope == Scope::kGrid ? 256 : kMaxThreads)
    Nvfp4QuantizeKernel(const Arguments<T> args) {
  constexpr bool kPerRow = kScope == Scope::kRow, kLoops = kScope == Scope::kGrid;
  if constexpr (kScope == Scope::kCluster) cg::this_cluster().barrier_arrive();
  const uint32_t stride = kPerRow ? blockDim.x : gridDim.x * blockDim.x;
  const uint32_t first = kPerRow ? threadIdx.x : blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t end = kPerRow ? args.groups_per_row : args.num_rows * args.groups_per_row;
  const T* x = args.x;
  if (kPerRow) x += size_t{blockIdx.x} * args.groups_per_row * kNvfp4Group;

  Group<T> groups[kGroups];
  auto load = [&](uint32_t begin) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const uint32_t index = begin + i * stride;
      const uint4* source = reinterpret_cast<const uint4*>(x + size_t{index} * kNvfp4Group);
#pragma unroll
      for (int quad = 0; quad < static_cast<int>(sizeof(T)); ++quad) {
        groups[i].quads[quad] = index < end ? source[quad] : uint4{0, 0, 0, 0};
      }
    }
  };

  // Only a grid has more than its registers hold; it walks back over what L2 saw last.
  uint32_t begin = first, amax = 0;
  while (true) {
    load(begin);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) amax = max(amax, Amax(groups[i].quads, T{}));
    if (!kLoops || begin + kGroups * stride >= end) break;
    begin += kGroups * stride;
  }
  ZeroPadding(args);
  amax = SharedMax<kScope>(amax, args.block_amax);

  const float global_scale = Nvfp4GlobalScale(__uint_as_float(amax));
  const float inverse = ApproximateReciprocal(kLargestE2m1 * global_scale);
  if (threadIdx.x == 0 && (kPerRow || blockIdx.x == 0)) {
    args.global_scale[blockIdx.x] = global_scale;
  }
  while (true) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const uint32_t index = begin + i * stride;
      const uint32_t row = kPerRow ? blockIdx.x : index / args.groups_per_row;
      const uint32_t column = kPerRow ? index : index % args.groups_per_row;
      const float group_amax = __uint_as_float(Amax(groups[i].quads, T{}));
      if (index < end) Store(args, groups[i], group_amax, row, column, global_scale, inverse);
    }
    if (!kLoops || begin == first) break;
    begin -= kGroups * stride;
    load(begin);
  }
}

template <typename T, int kGroups, Scope kScope>
ffi::Error Launch(const Arguments<T>& args, uint32_t num_blocks, uint32_t num_threads,
                  cudaStream_t stream) {
  auto* kernel = Nvfp4QuantizeKernel<T, kGroups, kScope>;
  cudaLaunchAttribute attribute;
  if (kScope == Scope::kCluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {kClusterSize, 1, 1};
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = kScope == Scope::kGrid;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = num_blocks;
  config.blockDim = num_threads;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return CudaStatus(cudaLaunchKernelEx(&config, kernel, args));
}

int64_t ThreadsFor(int64_t num_groups) {
  return std::max<int64_t>(32, (num_groups + 31) / 32 * 32);
}

template <typename T>
ffi::Error LaunchPerRow(const Arguments<T>& args, int num_multiprocessors, cudaStream_t stream) {
  if (args.num_rows == 0) return ffi::Error::Success();
  constexpr int kResidentThreads = 2048;
  const int64_t threads = ThreadsFor(args.groups_per_row);
  // Few rows: as many threads as possible. Many: as many bytes in flight as possible.
  if (threads <= kMaxThreads &&
      args.num_rows * threads <= num_multiprocessors * kResidentThreads) {
    return Launch<T, kFew, Scope::kRow>(args, args.num_rows, threads, stream);
  }
  const int64_t fewer = ThreadsFor((args.groups_per_row + kMany<T> - 1) / kMany<T>);
  if (fewer > kMaxThreads) {
    return Invalid("x", "width " + std::to_string(args.groups_per_row * kNvfp4Group),
                   "at most " + std::to_string(kMaxThreads * kMany<T> * kNvfp4Group));
  }
  return Launch<T, kMany<T>, Scope::kRow>(args, args.num_rows, fewer, stream);
}

template <typename T>
ffi::Error LaunchPerMatrix(const Arguments<T>& args, int num_multiprocessors,
                           cudaStream_t stream) {
  const int64_t num_groups = int64_t{args.num_rows} * args.groups_per_row;
  const int64_t per_block = (num_groups + kClusterSize - 1) / kClusterSize;
  if (per_block <= kMaxThreads) {
    return Launch<T, kFew, Scope::kCluster>(args, kClusterSize, ThreadsFor(per_block), stream);
  }
  if (per_block <= kMaxThreads * kMany<T>) {
    const int64_t threads = ThreadsFor((per_block + kMany<T> - 1) / kMany<T>);
    return Launch<T, kMany<T>, Scope::kCluster>(args, kClusterSize, threads, stream);
  }
  constexpr int kThreads = 256;
  int resident;
  DSV4_CHECK(CudaStatus(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &resident, Nvfp4QuantizeKernel<T, kMany<T>, Scope::kGrid>, kThreads, 0)));
  const int64_t useful = (num_groups + kThreads * kMany<T> - 1) / (kThreads * kMany<T>);
  const int64_t num_blocks = std::min<int64_t>(
      {useful, int64_t{resident} * num_multiprocessors, kNvfp4QuantizeWorkspace});
  return Launch<T, kMany<T>, Scope::kGrid>(args, num_blocks, kThreads, stream);
}

template <typename T>
ffi::Error Quantize(const Arguments<T>& args, bool per_row, cudaStream_t stream) {
  int device, num_multiprocessors;
  DSV4_CHECK(CudaStatus(cudaGetDevice(&device)));
  DSV4_CHECK(CudaStatus(
      cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device)));
  return per_row ? LaunchPerRow(args, num_multiprocessors, stream)
                 : LaunchPerMatrix(args, num_multiprocessors, stream);
}

ffi::Error Nvfp4Quantize(cudaStream_t stream, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> packed,
                         ffi::Result<ffi::AnyBuffer> scales,
                         ffi::Result<ffi::AnyBuffer> global_scale,
                         ffi::Result<ffi::AnyBuffer> workspace) {
  DSV4_CHECK(CheckNvfp4Quantize(x, *packed, *scales, *global_scale, *workspace));
  DSV4_CHECK(ExpectAligned("x", x, 16));
  auto arguments = [&](auto element) {
    using T = decltype(element);
    return Arguments<T>{static_cast<const T*>(x.untyped_data()),
                        static_cast<uint2*>(packed->untyped_data()),
                        static_cast<uint8_t*>(scales->untyped_data()),
                        global_scale->typed_data<float>(),
                        static_cast<uint32_t*>(workspace->untyped_data()),
                        static_cast<uint32_t>(x.dimensions()[0]),
                        static_cast<uint32_t>(x.dimensions()[1] / kNvfp4Group)};
  };
  const bool per_row = global_scale->dimensions().size() == 1;
  return x.element_type() == ffi::DataType::F32 ? Quantize(arguments(0.0f), per_row, stream)
                                                : Quantize(arguments(uint16_t{0}), per_row, stream);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_nvfp4_quantize, Nvfp4Quantize,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
