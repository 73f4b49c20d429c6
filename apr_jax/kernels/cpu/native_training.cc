// What training spends its time with beside XLA's products, for CPUs: attention within the segments of packed rows, and
// SwiGLU, both with their gradients. `native.py` compiles this file and calls it; docs/performance.md has the figures.
//
// Every sum is taken in an order that depends on its own row alone: not on other rows, nor on threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "native.h"

namespace {

constexpr int kBlock = kWidth;  // queries of a block, one to a place of a vector; and keys of a tile
#ifdef __AVX512F__
constexpr int kRows = 16;  // of a tile's sums that stay in registers
#else
constexpr int kRows = 4;
#endif
constexpr int64_t kDepth = 256;  // rows that a matrix's gradient takes at a time: what they hold stays in the caches
constexpr int64_t kNormRows = 64;  // rows of RMSNorm that one thread takes at a time
constexpr int64_t kGrain = 1 << 14;  // elements of SwiGLU that one thread takes at a time

// 16 rows of 16 columns: out[m][i] = sum over d of a[m][d] * b[d][i], or that is added to what is there. kTurned: `a`
// comes as [d][m]. Strides are floats from one row of memory to the next.
template <bool kTurned, bool kAdd>
inline __attribute__((always_inline)) void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                                    int64_t depth, float* out, int64_t out_stride) {
  for (int first = 0; first < kBlock; first += kRows) {
    Vector sums[kRows];
    for (int m = 0; m < kRows; ++m) sums[m] = kAdd ? load(out + (first + m) * out_stride) : Vector{};
    for (int64_t d = 0; d < depth; ++d) {
      const float* const from = a + (kTurned ? first + d * a_stride : first * a_stride + d);
      const Vector columns = load(b + d * b_stride);
      for (int m = 0; m < kRows; ++m) sums[m] += columns * from[kTurned ? m : m * a_stride];
    }
    for (int m = 0; m < kRows; ++m) std::memcpy(out + (first + m) * out_stride, &sums[m], sizeof(Vector));
  }
}

// 16 rows of H elements, side by side element by element: [H][16].
void turn(const float* rows, int64_t stride, int64_t H, float scale, float* out) {
  for (int64_t h = 0; h < H; ++h) {
    for (int m = 0; m < kBlock; ++m) out[h * kBlock + m] = rows[m * stride + h] * scale;
  }
}

// Queries, keys and values [B, T, heads, H] of one task: a row of the batch and one key/value head, whose queries' heads
// are G. Scores and their like are held by key: [key][query of the block].
struct Rows {
  int64_t T, H, G, query_stride, key_stride;  // floats from one token to the next
  float scale;
  const int32_t* first;  // of each token, the first that it sees
  const int32_t* ends;   // of each token, the first later one that does not see it

  int64_t begin(int64_t block) const { return first[block] / kBlock * kBlock; }

  // Whether no query of a block sees any of 16 keys: they are of branches that have ended.
  bool hidden(int64_t key, int64_t block) const {
    return *std::max_element(ends + key, ends + key + kBlock) <= block;
  }

  // Keys `begin` .. of a block of queries, turned, times the block's queries, turned; those out of sight get `kLowest`.
  void scores(const float* turned_keys, const float* turned_queries, int64_t block, float* out) const {
    for (int64_t key = begin(block); key <= block; key += kBlock, out += kBlock * kBlock) {
      if (hidden(key, block)) {
        std::fill_n(out, kBlock * kBlock, kLowest);
        continue;
      }
      multiply<true, false>(turned_keys + key * H, kBlock, turned_queries, kBlock, H, out, kBlock);
      const bool all_reach = *std::min_element(ends + key, ends + key + kBlock) >= block + kBlock;
      if (key < block && key >= first[block + kBlock - 1] && all_reach) continue;
      for (int64_t j = 0; j < kBlock; ++j) {
        for (int64_t i = 0; i < kBlock; ++i) {
          const int64_t time = block + i;
          const bool seen = key + j <= time && key + j >= first[time] && time < ends[key + j];
          out[j * kBlock + i] = seen ? out[j * kBlock + i] : kLowest;
        }
      }
    }
  }

  void turn_all(const float* keys, float* out) const {
    for (int64_t t = 0; t < T; t += kBlock) turn(keys + t * key_stride, key_stride, H, 1.0f, out + t * H);
  }
};

// Attention of a row's queries to the earlier tokens of their own segments, and the logarithm of each softmax's sum.
void attend(const Rows& rows, const float* q, const float* k, const float* v, float* out, float* logs, float* scratch) {
  const int64_t T = rows.T, H = rows.H;
  float *const keys = scratch, *const queries = keys + T * H, *const scores = queries + H * kBlock;
  rows.turn_all(k, keys);
  for (int64_t head = 0; head < rows.G; ++head) {
    for (int64_t block = 0; block < T; block += kBlock) {
      const int64_t begin = rows.begin(block), length = block + kBlock - begin;
      turn(q + block * rows.query_stride + head * H, rows.query_stride, H, rows.scale, queries);
      rows.scores(keys, queries, block, scores);
      float tops[kBlock], sums[kBlock] = {};
      std::fill(tops, tops + kBlock, kLowest);
      for (int64_t j = 0; j < length; ++j) {
        for (int i = 0; i < kBlock; ++i) tops[i] = std::max(tops[i], scores[j * kBlock + i]);
      }
      for (int64_t j = 0; j < length; ++j) {
#pragma omp simd
        for (int i = 0; i < kBlock; ++i) {
          scores[j * kBlock + i] = exp_negative(scores[j * kBlock + i] - tops[i]);
          sums[i] += scores[j * kBlock + i];
        }
      }
      float* const to = out + block * rows.query_stride + head * H;
      for (int64_t h = 0; h < H; h += kWidth) {
        multiply<true, false>(scores, kBlock, v + begin * rows.key_stride + h, rows.key_stride, length, to + h, rows.query_stride);
      }
      for (int64_t i = 0; i < kBlock; ++i) {
        for (int64_t h = 0; h < H; ++h) to[i * rows.query_stride + h] *= 1 / sums[i];
        logs[head * T + block + i] = tops[i] + std::log(sums[i]);
      }
    }
  }
}

// What the above's gradients are, given that of its output (Dao et al. 2022, algorithm 4).
void attend_backward(const Rows& rows, const float* q, const float* k, const float* v, const float* out,
                     const float* logs, const float* dout, float* dq, float* dk, float* dv, float* scratch) {
  const int64_t T = rows.T, H = rows.H, stride = rows.query_stride;
  float *const keys = scratch, *const values = keys + T * H, *const queries = values + T * H;
  float *const douts = queries + H * kBlock, *const weights = douts + H * kBlock, *const dscores = weights + T * kBlock;
  rows.turn_all(k, keys);
  rows.turn_all(v, values);
  for (int64_t t = 0; t < T; ++t) {
    std::fill_n(dk + t * rows.key_stride, H, 0.0f);
    std::fill_n(dv + t * rows.key_stride, H, 0.0f);
  }
  for (int64_t head = 0; head < rows.G; ++head) {
    for (int64_t block = 0; block < T; block += kBlock) {
      const int64_t begin = rows.begin(block), length = block + kBlock - begin, at = block * stride + head * H;
      turn(q + at, stride, H, rows.scale, queries);
      turn(dout + at, stride, H, 1.0f, douts);
      rows.scores(keys, queries, block, weights);
      float deltas[kBlock] = {};
      for (int64_t i = 0; i < kBlock; ++i) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t h = 0; h < H; ++h) sum += dout[at + i * stride + h] * out[at + i * stride + h];
        deltas[i] = sum;
      }
      for (int64_t j = 0; j < length; j += kBlock) {
        float* const tile = dscores + j * kBlock;
        if (rows.hidden(begin + j, block)) {
          std::fill_n(tile, kBlock * kBlock, 0.0f);
          continue;
        }
        multiply<true, false>(values + (begin + j) * H, kBlock, douts, kBlock, H, tile, kBlock);
      }
      const float* const log = logs + head * T + block;
      for (int64_t j = 0; j < length; ++j) {
#pragma omp simd
        for (int i = 0; i < kBlock; ++i) {
          const float weight = exp_negative(weights[j * kBlock + i] - log[i]);
          weights[j * kBlock + i] = weight;
          dscores[j * kBlock + i] = weight * (dscores[j * kBlock + i] - deltas[i]) * rows.scale;
        }
      }
      for (int64_t h = 0; h < H; h += kWidth) {
        multiply<true, false>(dscores, kBlock, k + begin * rows.key_stride + h, rows.key_stride, length, dq + at + h, stride);
        for (int64_t j = 0; j < length; j += kBlock) {
          if (rows.hidden(begin + j, block)) continue;
          const int64_t to = (begin + j) * rows.key_stride + h;
          multiply<false, true>(dscores + j * kBlock, kBlock, q + at + h, stride, kBlock, dk + to, rows.key_stride);
          multiply<false, true>(weights + j * kBlock, kBlock, dout + at + h, stride, kBlock, dv + to, rows.key_stride);
        }
      }
    }
  }
}

// Calls task(rows, where its queries begin, where its keys, where its logarithms, scratch) for each row and key/value
// head.
template <typename Task>
ffi::Error for_each_head(ffi::ThreadPool& pool, int64_t threads, const Floats& q, const Floats& k, const Integers& first,
                         const Integers& ends, const Task& task) {
  const int64_t B = q.dimensions()[0], T = q.dimensions()[1], N = q.dimensions()[2], H = q.dimensions()[3];
  const int64_t K = k.dimensions()[2], G = N / K;
  if (T % kBlock || H % kWidth) return ffi::Error::InvalidArgument("T and H must be multiples of 16");
  parallel(pool, threads, B * K, [&](int64_t index) {
    const int64_t row = index / K, head = index % K;
    static thread_local std::vector<float> scratch;
    scratch.resize(2 * T * (H + kBlock) + 2 * H * kBlock);
    const float scale = 1 / std::sqrt(static_cast<float>(H));
    const Rows rows{T, H, G, N * H, K * H, scale, first.typed_data() + row * T, ends.typed_data() + row * T};
    task(rows, row * T * N * H + head * G * H, row * T * K * H + head * H, (row * N + head * G) * T, scratch.data());
  });
  return ffi::Error::Success();
}

ffi::Error attention(ffi::ThreadPool pool, int64_t threads, Floats q, Floats k, Floats v, Integers first,
                     Integers ends, ffi::Result<Floats> out, ffi::Result<Floats> logs) {
  return for_each_head(pool, threads, q, k, first, ends, [&](const Rows& rows, int64_t query, int64_t key, int64_t log,
                                                       float* scratch) {
    attend(rows, q.typed_data() + query, k.typed_data() + key, v.typed_data() + key, out->typed_data() + query,
           logs->typed_data() + log, scratch);
  });
}

ffi::Error attention_backward(ffi::ThreadPool pool, int64_t threads, Floats q, Floats k, Floats v, Integers first,
                              Integers ends, Floats out, Floats logs, Floats dout, ffi::Result<Floats> dq, ffi::Result<Floats> dk,
                              ffi::Result<Floats> dv) {
  return for_each_head(pool, threads, q, k, first, ends, [&](const Rows& rows, int64_t query, int64_t key, int64_t log,
                                                       float* scratch) {
    attend_backward(rows, q.typed_data() + query, k.typed_data() + key, v.typed_data() + key, out.typed_data() + query,
                    logs.typed_data() + log, dout.typed_data() + query, dq->typed_data() + query,
                    dk->typed_data() + key, dv->typed_data() + key, scratch);
  });
}

// The gradient of a matrix: out[d][f] = sum over m of x[m][d] * y[m][f]. Rows are taken kDepth at a time, which are
// laid out for `multiply`.
ffi::Error outer(ffi::ThreadPool pool, int64_t threads, Floats x, Floats y, ffi::Result<Floats> out) {
  const int64_t D = x.dimensions().back(), F = y.dimensions().back(), M = x.element_count() / D;
  if (D % kBlock || F % kWidth) return ffi::Error::InvalidArgument("D and F must be multiples of 16");
  const int64_t panels = F / kWidth, each = (panels - 1) / threads + 1;
  parallel(pool, threads, (panels + each - 1) / each, [&](int64_t part) {
    static thread_local std::vector<float> scratch;
    scratch.resize(kDepth * (D + kWidth));
    float *const rows = scratch.data(), *const panel = rows + kDepth * D;
    for (int64_t first = 0; first < M; first += kDepth) {
      const int64_t depth = std::min(kDepth, M - first);
      const auto lay_out = [&](const float* from, int64_t width, float* to) {
        for (int64_t m = 0; m < depth; ++m) std::memcpy(to + m * kWidth, from + m * width, sizeof(Vector));
      };
      for (int64_t d = 0; d < D; d += kBlock) lay_out(x.typed_data() + first * D + d, D, rows + d * depth);
      for (int64_t f = part * each * kWidth; f < std::min((part + 1) * each, panels) * kWidth; f += kWidth) {
        lay_out(y.typed_data() + first * F + f, F, panel);
        for (int64_t d = 0; d < D; d += kBlock) {
          float* const to = out->typed_data() + d * F + f;
          if (first == 0) {
            multiply<true, false>(rows + d * depth, kBlock, panel, kWidth, depth, to, F);
          } else {
            multiply<true, true>(rows + d * depth, kBlock, panel, kWidth, depth, to, F);
          }
        }
      }
    }
  });
  return ffi::Error::Success();
}

// Calls task(begin, end) for parts of `count` elements.
template <typename Task>
void by_parts(ffi::ThreadPool& pool, int64_t threads, int64_t count, const Task& task) {
  parallel(pool, threads, (count + kGrain - 1) / kGrain, [&](int64_t part) {
    task(part * kGrain, std::min((part + 1) * kGrain, count));
  });
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

// Its gradients; that of the rows is added to `given`. The scale's is summed by parts of kNormRows rows, then over parts.
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(apr_attention, attention,
                              bind_threaded()
                                  .Arg<Floats>()    // q
                                  .Arg<Floats>()    // k
                                  .Arg<Floats>()    // v
                                  .Arg<Integers>()  // the first token that each sees
                                  .Arg<Integers>()  // the first that sees each no more
                                  .Ret<Floats>()    // out
                                  .Ret<Floats>());  // logs

XLA_FFI_DEFINE_HANDLER_SYMBOL(apr_attention_backward, attention_backward,
                              bind_threaded()
                                  .Arg<Floats>()    // q
                                  .Arg<Floats>()    // k
                                  .Arg<Floats>()    // v
                                  .Arg<Integers>()  // the first token that each sees
                                  .Arg<Integers>()  // the first that sees each no more
                                  .Arg<Floats>()    // out
                                  .Arg<Floats>()    // logs
                                  .Arg<Floats>()    // dout
                                  .Ret<Floats>()    // dq
                                  .Ret<Floats>()    // dk
                                  .Ret<Floats>());  // dv

XLA_FFI_DEFINE_HANDLER_SYMBOL(apr_outer, outer,
                              bind_threaded()
                                  .Arg<Floats>()    // x
                                  .Arg<Floats>()    // y
                                  .Ret<Floats>());  // out

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
