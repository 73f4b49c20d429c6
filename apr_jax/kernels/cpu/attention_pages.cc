// Attention of a decode step to pages, where they lie.
//
// Every sum is taken in an order that depends on its own row alone: not on other rows, nor on threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "common.h"

namespace {

// A row of a page as vectors of floats, kVectors of each line of memory: of bfloat16 the even numbers and the odd ones.
template <typename T>
struct Line {
  static constexpr int kNumbers = kLine / sizeof(T), kVectors = kNumbers / kWidth;

  static Vector load(const T* from, int vector) {
    if constexpr (kVectors == 1) {
      return ::load(from);
    } else {
      return load_half(from, vector);
    }
  }
};

// The numbers of one head in the order of its lines' vectors; as they come for a head dim that has no kernel, kH = 0.
template <int kH, typename T>
void spread(const T* from, int64_t H, float* to) {
  if constexpr (kH > 0) {
    for (int i = 0; i < kH / kWidth; ++i) {
      const Vector vector = Line<T>::load(from + i / Line<T>::kVectors * Line<T>::kNumbers, i % Line<T>::kVectors);
      store(vector, to + i * kWidth);
    }
  } else {
    for (int64_t h = 0; h < H; ++h) to[h] = number(from[h]);
  }
}

// And back, divided by their weights' sum.
template <int kH, typename T>
void collect(const float* from, int64_t H, float divisor, T* to) {
  constexpr int kNumbers = kH > 0 ? Line<T>::kNumbers : 1, kVectors = kH > 0 ? Line<T>::kVectors : 1;
  for (int64_t line = 0; line < H; line += kNumbers) {
    for (int i = 0; i < kNumbers; ++i) {
      to[line + i] = rounded<T>(from[line + i % kVectors * kWidth + i / kVectors] / divisor);
    }
  }
}

// The sum of each of 16 vectors.
Vector sums_of(const Vector (&of)[kWidth]) {
#ifdef __AVX512F__
  __m512 by_two[8], by_four[4], by_eight[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = (__m512)of[2 * i], b = (__m512)of[2 * i + 1];
    by_two[i] = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = (__m512d)by_two[2 * i], b = (__m512d)by_two[2 * i + 1];
    by_four[i] = (__m512)_mm512_unpacklo_pd(a, b) + (__m512)_mm512_unpackhi_pd(a, b);
  }
  for (int i = 0; i < 2; ++i) {
    const __m512 a = by_four[2 * i], b = by_four[2 * i + 1];
    by_eight[i] = _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
  }
  return (Vector)(_mm512_shuffle_f32x4(by_eight[0], by_eight[1], 0x88) +
                  _mm512_shuffle_f32x4(by_eight[0], by_eight[1], 0xdd));
#else
  float sums[kWidth], left[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    store(of[i], left);
#pragma GCC unroll 4
    for (int half = kWidth / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) left[j] += left[j + half];
    }
    sums[i] = left[0];
  }
  return load(sums);
#endif
}

// scores[s] = q . k[s] of `count` positions, with room for whole vectors; asks memory for as many from `next`.
template <int kH, typename T>
void score(const float* q, const T* k, int64_t count, int64_t H, const T* next, float* scores) {
  if constexpr (kH > 0) {
    for (int64_t first = 0; first < count; first += kWidth) {
      Vector sums[kWidth];
#pragma GCC unroll 16
      for (int64_t s = 0; s < kWidth; ++s) {
        const T *const row = k + std::min(first + s, count - 1) * kH, *const other = next + (first + s) * kH;
        Vector sum = {};
        for (int h = 0; h < kH; h += Line<T>::kNumbers) {
          __builtin_prefetch(other + h, 0, 1);
          for (int i = 0; i < Line<T>::kVectors; ++i) sum = sum + load(q + h + i * kWidth) * Line<T>::load(row + h, i);
        }
        sums[s] = sum;
      }
      store(sums_of(sums), scores + first);
    }
  } else {
    for (int64_t s = 0; s < count; ++s) {
      scores[s] = 0;
      for (int64_t h = 0; h < H; ++h) scores[s] += q[h] * number(k[s * H + h]);
    }
  }
}

// out += weights[s] v[s] over `count` positions; asks memory for as many from `next`.
template <int kH, typename T>
void add_values(const float* weights, const T* v, int64_t count, int64_t H, const T* next, float* out) {
  if constexpr (kH > 0) {
    Vector sums[kH / kWidth];
    for (int i = 0; i < kH / kWidth; ++i) sums[i] = load(out + i * kWidth);
    for (int64_t s = 0; s < count; ++s) {
      for (int h = 0; h < kH; h += Line<T>::kNumbers) {
        __builtin_prefetch(next + s * kH + h, 0, 1);
        for (int i = 0; i < Line<T>::kVectors; ++i) {
          Vector& sum = sums[h / kWidth + i];
          sum = sum + Line<T>::load(v + s * kH + h, i) * weights[s];
        }
      }
    }
    for (int i = 0; i < kH / kWidth; ++i) store(sums[i], out + i * kWidth);
  } else {
    for (int64_t s = 0; s < count; ++s) {
      for (int64_t h = 0; h < H; ++h) out[h] += weights[s] * number(v[s * H + h]);
    }
  }
}

// Scores become the weights of their softmax, times their sum, which is returned. There is room for whole vectors.
float softmax(float* scores, int64_t count, float scale) {
  const int64_t filled = (count + kWidth - 1) / kWidth * kWidth;
  std::fill(scores + count, scores + filled, kLowest);
  float top = kLowest, sum = 0;
#pragma omp simd reduction(max : top)
  for (int64_t s = 0; s < filled; ++s) top = std::max(top, scores[s]);
#pragma omp simd reduction(+ : sum)
  for (int64_t s = 0; s < filled; ++s) {
    scores[s] = exp_negative((scores[s] - top) * scale);
    sum += scores[s];
  }
  return sum;
}

// For each lane with seen[l] > 0: its new key and value go to position seen[l] - 1 of its row, and then its queries
// attend to the first seen[l], so lanes may be neighbouring positions of one row. Others write nothing and get zeros.
// Pages are [P, K, C, H], and changed in place. kH: H, or 0 for one that has no kernel of its own.
template <int kH, typename T>
void attend(ffi::ThreadPool& pool, int64_t threads, const ffi::AnyBuffer& q, const ffi::AnyBuffer& new_k,
            const ffi::AnyBuffer& new_v, const Integers& seen, const Integers& tables, const ffi::AnyBuffer& out,
            const ffi::AnyBuffer& k_out, const ffi::AnyBuffer& v_out) {
  const int64_t L = q.dimensions()[0], N = q.dimensions()[1], H = q.dimensions()[2], R = tables.dimensions()[1];
  const int64_t K = k_out.dimensions()[1], C = k_out.dimensions()[2], G = N / K;
  const float scale = 1 / std::sqrt(static_cast<float>(H));
  T *const k_pages = data<T>(k_out), *const v_pages = data<T>(v_out);
  if (std::accumulate(seen.typed_data(), seen.typed_data() + L, int64_t{0}) * N * H < kSmall / 8) threads = 1;
  const int32_t* const rows = tables.typed_data();
  for (int64_t lane = 0; lane < L; ++lane) {
    const int64_t last = seen.typed_data()[lane] - 1;
    if (last < 0) continue;
    const int64_t place = (rows[lane * R + last / C] * K * C + last % C) * H;
    for (int64_t head = 0; head < K; ++head) {
      std::copy_n(data<T>(new_k) + (lane * K + head) * H, H, k_pages + place + head * C * H);
      std::copy_n(data<T>(new_v) + (lane * K + head) * H, H, v_pages + place + head * C * H);
    }
  }
  // The heads of a page lie side by side, so a thread takes all of a lane's, unless there are hardly lanes enough.
  const int64_t parts = L >= 4 * threads ? 1 : std::min(K, threads), heads = (K + parts - 1) / parts;
  parallel(pool, threads, L * parts, [&](int64_t index) {
    const int64_t lane = index / parts, begin = index % parts * heads, end = std::min(begin + heads, K);
    const int64_t length = seen.typed_data()[lane], queries = (end - begin) * G;
    if (queries <= 0) return;
    const T* const from = data<T>(q) + (lane * N + begin * G) * H;
    T* const to = data<T>(out) + (lane * N + begin * G) * H;
    if (length <= 0) return void(std::fill(to, to + queries * H, rounded<T>(0)));
    const int64_t width = (length + C - 1) / C * C + kWidth;  // of a query's scores
    static thread_local std::vector<float> scratch;
    scratch.resize(queries * (width + 2 * H));
    float *const qs = scratch.data(), *const outs = qs + queries * H, *const scores = outs + queries * H;
    for (int64_t n = 0; n < queries; ++n) spread<kH>(from + n * H, H, qs + n * H);
    std::fill(outs, outs + queries * H, 0.0f);
    const int32_t *const table = rows + lane * R, *const table_after = rows + std::min(lane + 1, L - 1) * R;
    // Goes through the row page by page; `then` is the page that is read after its last one.
    auto each_block = [&](const T* pages, const T* then, const auto& visit) {
      for (int64_t first = 0; first < length; first += C) {
        const T* const page = pages + table[first / C] * K * C * H;
        const T* const next = first + C < length ? pages + table[first / C + 1] * K * C * H : then;
        for (int64_t n = begin * G; n < end * G; ++n) {
          const int64_t head = n / G * C * H;
          visit(n - begin * G, page + head, std::min(C, length - first), next + head, first);
        }
      }
    };
    const T* const values = v_pages + table[0] * K * C * H;
    each_block(k_pages, values, [&](int64_t n, const T* k, int64_t count, const T* next, int64_t first) {
      score<kH>(qs + n * H, k, count, H, next, scores + n * width + first);
    });
    static thread_local std::vector<float> sums;
    sums.resize(queries);
    for (int64_t n = 0; n < queries; ++n) sums[n] = softmax(scores + n * width, length, scale);
    const T* const keys_after = k_pages + table_after[0] * K * C * H;
    each_block(v_pages, keys_after, [&](int64_t n, const T* v, int64_t count, const T* next, int64_t first) {
      add_values<kH>(scores + n * width + first, v, count, H, next, outs + n * H);
    });
    for (int64_t n = 0; n < queries; ++n) collect<kH>(outs + n * H, H, sums[n], to + n * H);
  });
}

ffi::Error attend_of_any(ffi::ThreadPool pool, int64_t threads, ffi::AnyBuffer q, ffi::AnyBuffer new_k,
                         ffi::AnyBuffer new_v, ffi::AnyBuffer, ffi::AnyBuffer, Integers seen, Integers tables,
                         ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> k_pages,
                         ffi::Result<ffi::AnyBuffer> v_pages) {
  for (const auto& other : {new_k, new_v, *k_pages, *v_pages}) {
    if (other.element_type() != q.element_type()) {
      return ffi::Error::InvalidArgument("queries, keys, values and pages must have one dtype");
    }
  }
  return by_type(q, [&](auto type) {
    using T = decltype(type);
    const int64_t H = q.dimensions()[2];
    const auto kernel = H == 32 ? attend<32, T> : H == 64 ? attend<64, T> : H == 128 ? attend<128, T> : attend<0, T>;
    kernel(pool, threads, q, new_k, new_v, seen, tables, *out, *k_pages, *v_pages);
    return ffi::Error::Success();
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(apr_attend, attend_of_any,
                              bind_threaded()
                                  .Arg<ffi::AnyBuffer>()    // q
                                  .Arg<ffi::AnyBuffer>()    // new keys
                                  .Arg<ffi::AnyBuffer>()    // new values
                                  .Arg<ffi::AnyBuffer>()    // pages of keys
                                  .Arg<ffi::AnyBuffer>()    // pages of values
                                  .Arg<Integers>()          // seen
                                  .Arg<Integers>()          // tables
                                  .Ret<ffi::AnyBuffer>()    // out
                                  .Ret<ffi::AnyBuffer>()    // pages of keys
                                  .Ret<ffi::AnyBuffer>());  // pages of values
