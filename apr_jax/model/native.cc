// What a decode step spends its time with, for CPUs: products of a few rows with large matrices, and attention to pages
// where they lie. `native.py` compiles this file and calls it; docs/decode.md says why XLA's own programs do not do.
//
// Every sum is taken in an order that depends on its own row alone: not on other rows, nor on threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kWidth = 16;  // floats of a vector; the compiler splits it where the CPU's are shorter
typedef float Vector __attribute__((vector_size(kWidth * sizeof(float)), aligned(sizeof(float))));

#ifdef __AVX512F__
constexpr int kRows = 8;  // of the matrix, whose sums stay in registers: 8 x 2 of 32
#else
constexpr int kRows = 4;
#endif
constexpr int kTile = 2 * kWidth;       // rows of x that are multiplied at once
constexpr int kStrip = 2 * kTile;       // rows of x that stay in the cache while the matrix comes by
constexpr int kChunk = 64;              // rows of the matrix that a thread takes at once
constexpr float kLowest = -1e30f;         // finite, so that a difference of two is no NaN
constexpr int kFew = 4;                 // up to so many rows of x a row of the matrix is read as it lies

Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

void prefetch(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth) __builtin_prefetch(from + i, 0, 1);
}

float total(Vector v) {
  float sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += v[i];
  return sum;
}

// Calls task(0) ... task(count - 1), on this thread and on up to `threads - 1` of XLA's. Tasks are claimed one by one, so
// a thread that comes late finds nothing to do, and none is waited for that has not begun.
template <typename Task>
void parallel(ffi::ThreadPool& pool, int64_t threads, int64_t count, const Task& task) {
  struct Claims {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto claims = std::make_shared<Claims>();
  auto work = [claims, count, &task] {
    for (int64_t index; (index = claims->next.fetch_add(1)) < count; claims->done.fetch_add(1)) task(index);
  };
  for (int64_t other = 1; other < std::min(threads, count); ++other) pool.Schedule([work] { work(); });
  work();
  while (claims->done.load() < count) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

// out[m][0 .. rows) = x[m] . matrix[0 .. rows), for m < kM.
template <int kM>
void few_rows(const float* x, const float* matrix, float* out, int64_t rows, int64_t D, int64_t F) {
  constexpr int kAtOnce = 4;
  for (int64_t row = 0; row < rows; row += kAtOnce) {
    const int count = static_cast<int>(std::min<int64_t>(kAtOnce, rows - row));
    const float* from[kAtOnce];
    for (int r = 0; r < kAtOnce; ++r) from[r] = matrix + (row + std::min(r, count - 1)) * D;
    Vector sums[kAtOnce][kM] = {};
    int64_t d = 0;
    for (; d + kWidth <= D; d += kWidth) {
      for (int r = 0; r < kAtOnce; ++r) {
        __builtin_prefetch(from[r] + kAtOnce * D + d, 0, 1);
        for (int m = 0; m < kM; ++m) sums[r][m] += load(from[r] + d) * load(x + m * D + d);
      }
    }
    for (int r = 0; r < count; ++r) {
      for (int m = 0; m < kM; ++m) {
        float sum = total(sums[r][m]);
        for (int64_t rest = d; rest < D; ++rest) sum += from[r][rest] * x[m * D + rest];
        out[m * F + row + r] = sum;
      }
    }
  }
}

// out[m][0 .. kR) = columns[.][m] . matrix[0 .. kR), for m < kV * kWidth, of which the first `count` are wanted.
template <int kR, int kV>
void tile(const float* matrix, const float* columns, int64_t width, float* out, int64_t D, int64_t F, int64_t count,
          bool first) {
  Vector sums[kR][kV] = {};
  auto add = [&](int64_t d) __attribute__((always_inline)) {
    Vector x[kV];
    for (int v = 0; v < kV; ++v) x[v] = load(columns + d * width + v * kWidth);
    for (int r = 0; r < kR; ++r) {
      for (int v = 0; v < kV; ++v) sums[r][v] += matrix[r * D + d] * x[v];
    }
  };
  int64_t d = 0;
  for (; d + kWidth <= D; d += kWidth) {
    if (first) {  // the rows after these, which memory would else deliver too late
      for (int r = 0; r < kR; ++r) __builtin_prefetch(matrix + (kR + r) * D + d, 0, 1);
    }
    for (int i = 0; i < kWidth; ++i) add(d + i);
  }
  for (; d < D; ++d) add(d);
  for (int64_t m = 0; m < count; ++m) {
    for (int r = 0; r < kR; ++r) out[m * F + r] = sums[r][m / kWidth][m % kWidth];
  }
}

template <int kR>
void strip(const float* matrix, const float* columns, int64_t width, float* out, int64_t D, int64_t F, int64_t rows) {
  for (int64_t m = 0; m < rows; m += kTile) {
    const int64_t count = std::min<int64_t>(kTile, rows - m);
    if (count > kWidth) {
      tile<kR, 2>(matrix, columns + m, width, out + m * F, D, F, count, m == 0);
    } else {
      tile<kR, 1>(matrix, columns + m, width, out + m * F, D, F, count, m == 0);
    }
  }
}

// out[m][f] = sum over d of x[m][d] * matrix[f][d].
ffi::Error product(ffi::ThreadPool pool, int64_t threads, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> matrix,
                   ffi::ResultBuffer<ffi::F32> out) {
  const int64_t D = x.dimensions().back(), M = x.element_count() / D, F = out->dimensions().back();
  if (static_cast<int64_t>(matrix.element_count()) != F * D) return ffi::Error::InvalidArgument("matrix is not [F, D]");
  const float *const xs = x.typed_data(), *const rows = matrix.typed_data();
  float* const outs = out->typed_data();
  const int64_t chunks = (F + kChunk - 1) / kChunk;
  if (M <= kFew) {
    constexpr decltype(&few_rows<1>) kernels[] = {few_rows<1>, few_rows<2>, few_rows<3>, few_rows<4>};
    parallel(pool, threads, chunks, [&](int64_t chunk) {
      const int64_t f = chunk * kChunk;
      kernels[M - 1](xs, rows + f * D, outs + f, std::min<int64_t>(kChunk, F - f), D, F);
    });
    return ffi::Error::Success();
  }
  // Columns of each strip side by side, [strip][d][width]; what fills up a strip's last vector is zero.
  static thread_local std::vector<float> scratch;
  const int64_t strips = (M + kStrip - 1) / kStrip, blocks = (D + kWidth - 1) / kWidth;
  const int64_t width = std::min<int64_t>(kStrip, (M + kWidth - 1) / kWidth * kWidth);
  scratch.resize(strips * D * width);
  float* const columns = scratch.data();
  parallel(pool, threads, strips * blocks, [&](int64_t index) {
    const int64_t first = index / blocks * kStrip, begin = index % blocks * kWidth;
    const int64_t end = std::min<int64_t>(begin + kWidth, D), count = std::min<int64_t>(kStrip, M - first);
    float* const to = columns + index / blocks * D * width;
    for (int64_t m = 0; m < (count + kWidth - 1) / kWidth * kWidth; ++m) {
      for (int64_t d = begin; d < end; ++d) to[d * width + m] = m < count ? xs[(first + m) * D + d] : 0;
    }
  });
  parallel(pool, threads, chunks, [&](int64_t chunk) {
    const int64_t end = std::min<int64_t>((chunk + 1) * kChunk, F);
    for (int64_t s = 0; s < strips; ++s) {
      const float* const from = columns + s * D * width;
      const int64_t first = s * kStrip, count = std::min<int64_t>(kStrip, M - first);
      int64_t f = chunk * kChunk;
      for (; f + kRows <= end; f += kRows) strip<kRows>(rows + f * D, from, width, outs + first * F + f, D, F, count);
      for (; f < end; ++f) strip<1>(rows + f * D, from, width, outs + first * F + f, D, F, count);
    }
  });
  return ffi::Error::Success();
}

// exp(x) for x <= 0, to 2 units in the last place; 0 below -87 (Cody and Waite's reduction, then a polynomial).
inline float exp_negative(float x) {
  const float n = std::nearbyint(std::max(x, -87.0f) * 1.44269504f);
  const float r = (std::max(x, -87.0f) - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -87.0f ? 0.0f : (p * r * r + r + 1.0f) * power;
}

// One block of `count` positions of one key/value head, for its G queries: an online softmax's running maximum and sum
// `[G]` and weighted values `[G, H]` go on. `ahead`: floats from here to what memory will be asked for next.
template <int kH>
void attend_block(const float* q, const float* k, const float* v, int64_t count, int64_t ahead, int64_t G, int64_t head_dim,
                  float* weights, float* tops, float* sums, float* out) {
  const int64_t H = kH ? kH : head_dim;
  const float scale = 1 / std::sqrt(static_cast<float>(H));
  for (int64_t g = 0; g < G; ++g) {
    float top = tops[g];
    for (int64_t s = 0; s < count; ++s) {
      if (g == 0) prefetch(k + s * H + ahead, H);
      float score = 0;
#pragma omp simd reduction(+ : score)
      for (int64_t h = 0; h < H; ++h) score += q[g * H + h] * k[s * H + h];
      weights[s] = score * scale;
      top = std::max(top, weights[s]);
    }
    const float shrink = exp_negative(tops[g] - top);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t s = 0; s < count; ++s) {
      weights[s] = exp_negative(weights[s] - top);
      sum += weights[s];
    }
    tops[g] = top;
    sums[g] = sums[g] * shrink + sum;
    float* const o = out + g * H;
    for (int64_t h = 0; h < H; ++h) o[h] *= shrink;
    for (int64_t s = 0; s < count; ++s) {
      if (g == 0) prefetch(v + s * H + ahead, H);
      for (int64_t h = 0; h < H; ++h) o[h] += weights[s] * v[s * H + h];
    }
  }
}

// For each lane with seen[l] > 0: its new key and value go to position seen[l] - 1 of its row, and its queries attend to
// the first seen[l]. Others write nothing and get zeros. Pages are [P, K, C, H], and changed in place.
ffi::Error attend(ffi::ThreadPool pool, int64_t threads, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> new_k,
                  ffi::Buffer<ffi::F32> new_v, ffi::Buffer<ffi::F32>, ffi::Buffer<ffi::F32>, ffi::Buffer<ffi::S32> seen,
                  ffi::Buffer<ffi::S32> tables, ffi::ResultBuffer<ffi::F32> out, ffi::ResultBuffer<ffi::F32> k_pages,
                  ffi::ResultBuffer<ffi::F32> v_pages) {
  const int64_t L = q.dimensions()[0], N = q.dimensions()[1], H = q.dimensions()[2], R = tables.dimensions()[1];
  const int64_t K = k_pages->dimensions()[1], C = k_pages->dimensions()[2], G = N / K;
  constexpr decltype(&attend_block<0>) kernels[] = {attend_block<0>, attend_block<32>, attend_block<64>, attend_block<128>};
  const auto kernel = kernels[H == 32 ? 1 : H == 64 ? 2 : H == 128 ? 3 : 0];
  // The heads of a page lie side by side, so a thread takes all of a lane's, unless there are hardly lanes enough.
  const int64_t parts = L >= 4 * threads ? 1 : std::min(K, threads), heads = (K + parts - 1) / parts;
  parallel(pool, threads, L * parts, [&](int64_t index) {
    const int64_t lane = index / parts, begin = index % parts * heads, end = std::min(begin + heads, K);
    const int64_t length = seen.typed_data()[lane], queries = (end - begin) * G;
    if (queries <= 0) return;
    const float* const qs = q.typed_data() + (lane * N + begin * G) * H;
    float* const outs = out->typed_data() + (lane * N + begin * G) * H;
    std::fill(outs, outs + queries * H, 0.0f);
    if (length <= 0) return;
    const int32_t* const table = tables.typed_data() + lane * R;
    static thread_local std::vector<float> scratch;
    scratch.resize(C + 2 * queries);
    float *const weights = scratch.data(), *const tops = weights + C, *const sums = tops + queries;
    std::fill(tops, tops + queries, kLowest);
    std::fill(sums, sums + queries, 0.0f);
    for (int64_t first = 0; first < length; first += C) {
      const int64_t page = table[first / C] * K, count = std::min(C, length - first);
      const int64_t next = first + C < length ? (table[first / C + 1] * K + begin) * C * H : 0;
      for (int64_t head = begin; head < end; ++head) {
        const int64_t at = (page + head) * C * H, ahead = head + 1 < end || !next ? C * H : next - at;
        float *const k = k_pages->typed_data() + at, *const v = v_pages->typed_data() + at;
        if (first + count == length) {
          std::copy_n(new_k.typed_data() + (lane * K + head) * H, H, k + (count - 1) * H);
          std::copy_n(new_v.typed_data() + (lane * K + head) * H, H, v + (count - 1) * H);
        }
        const int64_t own = (head - begin) * G;
        kernel(qs + own * H, k, v, count, ahead, G, H, weights, tops + own, sums + own, outs + own * H);
      }
    }
    for (int64_t n = 0; n < queries; ++n) {
      for (int64_t h = 0; h < H; ++h) outs[n * H + h] /= sums[n];
    }
  });
  return ffi::Error::Success();
}

}  // namespace

using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;

XLA_FFI_DEFINE_HANDLER_SYMBOL(apr_product, product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("threads")
                                  .Arg<Floats>()    // x
                                  .Arg<Floats>()    // matrix
                                  .Ret<Floats>());  // out

XLA_FFI_DEFINE_HANDLER_SYMBOL(apr_attend, attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("threads")
                                  .Arg<Floats>()      // q
                                  .Arg<Floats>()      // new keys
                                  .Arg<Floats>()      // new values
                                  .Arg<Floats>()      // pages of keys
                                  .Arg<Floats>()      // pages of values
                                  .Arg<Integers>()    // seen
                                  .Arg<Integers>()    // tables
                                  .Ret<Floats>()      // out
                                  .Ret<Floats>()      // pages of keys
                                  .Ret<Floats>());    // pages of values
