// Hyper-connections on CPUs: hc_pre, hc_post and hc_post_pre.

#include "dsv4/hyper_connections.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dsv4/formats.h"

namespace dsv4 {
namespace {

double Sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

struct Gates {
  const float* fn;
  const float* base;
  const float* scale;
  const float* norm_weight;
  int32_t num_iterations;
  double eps, norm_eps;
};

// Softmax of the rows, then columns and rows in turn divided by their sums.
void Sinkhorn(double (&mix)[kNumStreams][kNumStreams], int32_t num_iterations, double eps) {
  for (auto& row : mix) {
    const double largest = *std::max_element(row, row + kNumStreams);
    double sum = 0;
    for (double& x : row) sum += x = std::exp(x - largest);
    for (double& x : row) x = x / sum + eps;
  }
  for (int32_t i = 0;; ++i) {
    for (int k = 0; k < kNumStreams; ++k) {
      double sum = eps;
      for (const auto& row : mix) sum += row[k];
      for (auto& row : mix) row[k] /= sum;
    }
    if (i + 1 >= num_iterations) return;
    for (auto& row : mix) {
      double sum = eps;
      for (double x : row) sum += x;
      for (double& x : row) x /= sum;
    }
  }
}

double InverseRms(const uint16_t* x, int64_t size, double eps) {
  double squares = 0;
  for (int64_t i = 0; i < size; ++i) squares += std::pow(FromBfloat16(x[i]), 2);
  return 1.0 / std::sqrt(squares / size + eps);
}

// One token: from its streams [4, width] to x [width], post [4] and comb [4, 4].
void PreToken(const uint16_t* streams, int64_t width, const Gates& gates, uint16_t* x, float* post,
              float* comb) {
  const int64_t size = kNumStreams * width;
  const double inverse_rms = InverseRms(streams, size, gates.norm_eps);
  const auto gate = [&](int row, int part) {
    double sum = 0;
    for (int64_t i = 0; i < size; ++i) sum += FromBfloat16(streams[i]) * gates.fn[row * size + i];
    return sum * inverse_rms * gates.scale[part] + gates.base[row];
  };
  double pre[kNumStreams], mix[kNumStreams][kNumStreams];
  for (int j = 0; j < kNumStreams; ++j) {
    pre[j] = Sigmoid(gate(j, 0)) + gates.eps;
    post[j] = 2 * Sigmoid(gate(kNumStreams + j, 1));
    for (int k = 0; k < kNumStreams; ++k) mix[j][k] = gate((2 + j) * kNumStreams + k, 2);
  }
  Sinkhorn(mix, gates.num_iterations, gates.eps);
  std::copy(&mix[0][0], &mix[0][0] + kNumStreams * kNumStreams, comb);
  for (int64_t i = 0; i < width; ++i) {
    double sum = 0;
    for (int j = 0; j < kNumStreams; ++j) sum += pre[j] * FromBfloat16(streams[j * width + i]);
    x[i] = ToBfloat16(sum);
  }
  const double scale = InverseRms(x, width, gates.norm_eps);
  for (int64_t i = 0; i < width; ++i) {
    x[i] = ToBfloat16(FromBfloat16(x[i]) * scale * gates.norm_weight[i]);
  }
}

void PostToken(const uint16_t* output, const uint16_t* streams, const float* post,
               const float* comb, int64_t width, uint16_t* new_streams) {
  for (int k = 0; k < kNumStreams; ++k) {
    for (int64_t i = 0; i < width; ++i) {
      double sum = double{post[k]} * FromBfloat16(output[i]);
      for (int j = 0; j < kNumStreams; ++j) {
        sum += double{comb[j * kNumStreams + k]} * FromBfloat16(streams[j * width + i]);
      }
      new_streams[k * width + i] = ToBfloat16(sum);
    }
  }
}

template <typename T>
const T* In(const ffi::AnyBuffer& buffer) {
  return static_cast<const T*>(buffer.untyped_data());
}

template <typename T>
T* Out(ffi::Result<ffi::AnyBuffer>& buffer) {
  return static_cast<T*>(buffer->untyped_data());
}

ffi::Error Post(ffi::AnyBuffer output, ffi::AnyBuffer streams, ffi::AnyBuffer post,
                ffi::AnyBuffer comb, ffi::Result<ffi::AnyBuffer> new_streams) {
  DSV4_CHECK(ExpectSpread(output, streams, post, comb));
  const int64_t width = streams.dimensions()[2];
  for (int64_t token = 0; token < streams.dimensions()[0]; ++token) {
    const int64_t first = token * kNumStreams * width;
    PostToken(In<uint16_t>(output) + token * width, In<uint16_t>(streams) + first,
              In<float>(post) + token * kNumStreams,
              In<float>(comb) + token * kNumStreams * kNumStreams, width,
              Out<uint16_t>(new_streams) + first);
  }
  return ffi::Error::Success();
}

ffi::Error Pre(ffi::AnyBuffer streams, ffi::AnyBuffer fn, ffi::AnyBuffer base,
               ffi::AnyBuffer scale, ffi::AnyBuffer norm_weight, int32_t num_iterations, float eps,
               float norm_eps, ffi::Result<ffi::AnyBuffer> x, ffi::Result<ffi::AnyBuffer> post,
               ffi::Result<ffi::AnyBuffer> comb, ffi::Result<ffi::AnyBuffer> /*sums*/) {
  DSV4_CHECK(ExpectGates(streams, fn, base, scale, norm_weight));
  const Gates gates = {In<float>(fn),          In<float>(base), In<float>(scale),
                       In<float>(norm_weight), num_iterations,  eps,
                       norm_eps};
  const int64_t width = streams.dimensions()[2];
  for (int64_t token = 0; token < streams.dimensions()[0]; ++token) {
    PreToken(In<uint16_t>(streams) + token * kNumStreams * width, width, gates,
             Out<uint16_t>(x) + token * width, Out<float>(post) + token * kNumStreams,
             Out<float>(comb) + token * kNumStreams * kNumStreams);
  }
  return ffi::Error::Success();
}

ffi::Error PostPre(ffi::AnyBuffer output, ffi::AnyBuffer streams, ffi::AnyBuffer post,
                   ffi::AnyBuffer comb, ffi::AnyBuffer fn, ffi::AnyBuffer base,
                   ffi::AnyBuffer scale, ffi::AnyBuffer norm_weight, int32_t num_iterations,
                   float eps, float norm_eps, ffi::Result<ffi::AnyBuffer> new_streams,
                   ffi::Result<ffi::AnyBuffer> x, ffi::Result<ffi::AnyBuffer> new_post,
                   ffi::Result<ffi::AnyBuffer> new_comb, ffi::Result<ffi::AnyBuffer> sums) {
  DSV4_CHECK(Post(output, streams, post, comb, new_streams));
  return Pre(*new_streams, fn, base, scale, norm_weight, num_iterations, eps, norm_eps, x,
             new_post, new_comb, sums);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_hc_post, Post,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_hc_pre, Pre,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<int32_t>("num_iterations")
                                  .Attr<float>("eps")
                                  .Attr<float>("norm_eps")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv4_hc_post_pre, PostPre,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<int32_t>("num_iterations")
                                  .Attr<float>("eps")
                                  .Attr<float>("norm_eps")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dsv4
