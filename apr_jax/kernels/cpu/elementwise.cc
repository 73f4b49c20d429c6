// RoPE, SwiGLU and RMSNorm, forward and backward.
//
// Every sum is taken in an order that depends on its own row alone: not on other rows, nor on threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common.h"

namespace {

constexpr int64_t kNormRows = 64;    // rows of RMSNorm that one thread takes at a time
constexpr int64_t kGrain = 1 << 14;  // elements of SwiGLU that one thread takes at a time

// Heads of a row, of two halves each, rotated by its angles [H / 2].
template <typename T>
void rotate_heads(const T* x, int64_t heads, const float* cosine, const float* sine, int64_t half, T* out) {
  for (int64_t head = 0; head < heads; ++head, x += 2 * half, out += 2 * half) {
    for (int64_t h = 0; h < half; ++h) {
      const float first = number(x[h]), second = number(x[half + h]);
      out[h] = rounded<T>(first * cosine[h] - second * sine[h]);
      out[half + h] = rounded<T>(second * cosine[h] + first * sine[h]);
    }
  }
}

ffi::Error rotate(ffi::AnyBuffer x, Floats cosines, Floats sines, ffi::Result<ffi::AnyBuffer> out) {
  const int64_t W = x.dimensions().back(), half = cosines.dimensions().back(), rows = x.element_count() / W;
  return by_type(x, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = 0; row < rows; ++row) {
      rotate_heads(data<T>(x) + row * W, W / (2 * half), cosines.typed_data() + row * half,
                   sines.typed_data() + row * half, half, data<T>(*out) + row * W);
    }
    return ffi::Error::Success();
  });
}

// Calls task(begin, end) for parts of `count` elements.
template <typename Task>
void by_parts(ffi::ThreadPool& pool, int64_t threads, int64_t count, const Task& task) {
  parallel(pool, threads, (count + kGrain - 1) / kGrain,
           [&](int64_t part) { task(part * kGrain, std::min((part + 1) * kGrain, count)); });
}

// silu(gate) * up
ffi::Error swiglu(ffi::ThreadPool pool, int64_t threads, ffi::AnyBuffer gates, ffi::AnyBuffer ups,
                  ffi::Result<ffi::AnyBuffer> outs) {
  if (ups.element_type() != gates.element_type()) return ffi::Error::InvalidArgument("gate and up must have one dtype");
  return by_type(gates, [&](auto type) {
    using T = decltype(type);
    const T *const gate = data<T>(gates), *const up = data<T>(ups);
    T* const out = data<T>(*outs);
    by_parts(pool, threads, gates.element_count(), [&](int64_t begin, int64_t end) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) {
        const float x = number(gate[i]);
        out[i] = rounded<T>(x * sigmoid(x) * number(up[i]));
      }
    });
    return ffi::Error::Success();
  });
}

ffi::Error swiglu_backward(ffi::ThreadPool pool, int64_t threads, Floats gates, Floats ups, Floats douts,
                           ffi::Result<Floats> dgates, ffi::Result<Floats> dups) {
  const float *const gate = gates.typed_data(), *const up = ups.typed_data(), *const dout = douts.typed_data();
  float *const dgate = dgates->typed_data(), *const dup = dups->typed_data();
  by_parts(pool, threads, gates.element_count(), [&](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const float s = sigmoid(gate[i]);
      dgate[i] = dout[i] * up[i] * s * (1 + gate[i] * (1 - s));
      dup[i] = dout[i] * gate[i] * s;
    }
  });
  return ffi::Error::Success();
}

// 1 / sqrt(mean(x^2) + eps)
template <typename T>
inline float inverse_norm(const T* x, int64_t D, float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) sum += number(x[d]) * number(x[d]);
  return 1 / std::sqrt(sum / D + eps);
}

// RMSNorm of each row.
ffi::Error rms_norm(ffi::ThreadPool pool, int64_t threads, float eps, ffi::AnyBuffer xs, Floats scales,
                    ffi::Result<ffi::AnyBuffer> outs) {
  const int64_t D = scales.element_count(), rows = xs.element_count() / D;
  const float* const scale = scales.typed_data();
  return by_type(xs, [&](auto type) {
    using T = decltype(type);
    parallel(pool, threads, (rows + kNormRows - 1) / kNormRows, [&](int64_t part) {
      for (int64_t row = part * kNormRows; row < std::min((part + 1) * kNormRows, rows); ++row) {
        const T* const x = data<T>(xs) + row * D;
        T* const out = data<T>(*outs) + row * D;
        const float inverse = inverse_norm(x, D, eps);
        for (int64_t d = 0; d < D; ++d) out[d] = rounded<T>(number(x[d]) * inverse * scale[d]);
      }
    });
    return ffi::Error::Success();
  });
}

// Its gradients; that of the rows is added to `given`. The scale's is summed by parts of kNormRows rows, then over
// parts.
ffi::Error rms_norm_backward(ffi::ThreadPool pool, int64_t threads, float eps, Floats xs, Floats scales, Floats douts,
                             Floats given, ffi::Result<Floats> dxs, ffi::Result<Floats> dscales) {
  const int64_t D = scales.element_count(), rows = xs.element_count() / D, parts = (rows + kNormRows - 1) / kNormRows;
  const float* const scale = scales.typed_data();
  std::vector<float> of_parts(parts * D, 0.0f);
  parallel(pool, threads, parts, [&](int64_t part) {
    float* const dscale = of_parts.data() + part * D;
    for (int64_t row = part * kNormRows; row < std::min((part + 1) * kNormRows, rows); ++row) {
      const float *const x = xs.typed_data() + row * D, *const dout = douts.typed_data() + row * D;
      const float* const before = given.typed_data() + row * D;
      float* const dx = dxs->typed_data() + row * D;
      const float inverse = inverse_norm(x, D, eps);
      float along = 0;
#pragma omp simd reduction(+ : along)
      for (int64_t d = 0; d < D; ++d) along += dout[d] * scale[d] * x[d];
      along *= inverse * inverse / D;
      for (int64_t d = 0; d < D; ++d) {
        dx[d] = before[d] + inverse * (dout[d] * scale[d] - x[d] * along);
        dscale[d] += dout[d] * x[d] * inverse;
      }
    }
  });
  float* const sum = dscales->typed_data();
  std::fill_n(sum, D, 0.0f);
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t d = 0; d < D; ++d) sum[d] += of_parts[part * D + d];
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(apr_rotate, rotate,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()    // x
                                  .Arg<Floats>()            // cosines
                                  .Arg<Floats>()            // sines
                                  .Ret<ffi::AnyBuffer>());  // out

XLA_FFI_DEFINE_HANDLER_SYMBOL(apr_swiglu, swiglu,
                              bind_threaded()
                                  .Arg<ffi::AnyBuffer>()    // gate
                                  .Arg<ffi::AnyBuffer>()    // up
                                  .Ret<ffi::AnyBuffer>());  // out

XLA_FFI_DEFINE_HANDLER_SYMBOL(apr_swiglu_backward, swiglu_backward,
                              bind_threaded()
                                  .Arg<Floats>()    // gate
                                  .Arg<Floats>()    // up
                                  .Arg<Floats>()    // dout
                                  .Ret<Floats>()    // dgate
                                  .Ret<Floats>());  // dup

XLA_FFI_DEFINE_HANDLER_SYMBOL(apr_rms_norm, rms_norm,
                              bind_threaded()
                                  .Attr<float>("eps")
                                  .Arg<ffi::AnyBuffer>()    // x
                                  .Arg<Floats>()            // scale
                                  .Ret<ffi::AnyBuffer>());  // out

XLA_FFI_DEFINE_HANDLER_SYMBOL(apr_rms_norm_backward, rms_norm_backward,
                              bind_threaded()
                                  .Attr<float>("eps")
                                  .Arg<Floats>()    // x
                                  .Arg<Floats>()    // scale
                                  .Arg<Floats>()    // dout
                                  .Arg<Floats>()    // what dx is added to
                                  .Ret<Floats>()    // dx
                                  .Ret<Floats>());  // dscale
