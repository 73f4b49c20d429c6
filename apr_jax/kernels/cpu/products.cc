// Products with large matrices: of the few rows of a decode step, from panels, and the gradient of a matrix.
//
// Every sum is taken in an order that depends on its own row alone: not on other rows, nor on threads.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "common.h"
#include "tile.h"

namespace {

#ifdef __AVX512F__
constexpr int kTile = 16;  // rows of x that are multiplied at once: their sums stay in registers
#else
constexpr int kTile = 6;
#endif
constexpr int kChunks = 32;      // parts of the work for each thread, as a thread may come late
constexpr int64_t kAhead = 128;  // vectors from what is read to what memory is asked for
constexpr int64_t kDepth = 256;  // rows that a matrix's gradient takes at a time: what they hold stays in the caches

// How a panel of 16 columns is gone through: a step multiplies one row of it, in bfloat16 two, which lie as 16 pairs.
template <typename T>
struct Step {
  static constexpr int64_t kRows = 1;
  using Factor = float;

  static Factor factor(const float* x, int64_t) { return *x; }
  static Vector add(Vector sum, const float* panel, Factor x) { return sum + load(panel) * x; }
};

template <>
struct Step<Bfloat16> {
  static constexpr int64_t kRows = 2;
  using Factor = uint32_t;

  static Factor factor(const Bfloat16* x, int64_t rest) {
    return x[0].bits | (rest > 1 ? static_cast<uint32_t>(x[1].bits) << 16 : 0);
  }
  static Vector add(Vector sum, const Bfloat16* panel, Factor x) {
#ifdef __AVX512BF16__
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(panel), (__m512bh)_mm512_set1_epi32(x));
#else
    const float first = number(Bfloat16{static_cast<uint16_t>(x)});
    const float second = number(Bfloat16{static_cast<uint16_t>(x >> 16)});
    return sum + load_half(panel, true) * second + load_half(panel, false) * first;
#endif
  }
};

// kM rows of x times kP neighbouring panels of some steps, of which there are `columns` columns.
template <int kP, int kM, typename T>
void multiply(const typename Step<T>::Factor* x, const T* panels, float* out, int64_t steps, int64_t F,
              int64_t columns) {
  constexpr int64_t kVector = kWidth * Step<T>::kRows;
  Vector sums[kP][kM] = {};
  for (int64_t step = 0; step < steps; ++step) {
    // Behind the end of these panels: in the kP next ones.
    const int64_t ahead = kAhead + (step + kAhead < steps ? 0 : (kP - 1) * steps);
    for (int p = 0; p < kP; ++p) {
      const T* const from = panels + (p * steps + step) * kVector;
      __builtin_prefetch(from + ahead * kVector, 0, 1);
      for (int m = 0; m < kM; ++m) sums[p][m] = Step<T>::add(sums[p][m], from, x[step * kM + m]);
    }
  }
  for (int m = 0; m < kM; ++m) {
    for (int p = 0; p < kP; ++p) {
      const int64_t count = std::min<int64_t>(kWidth, columns - p * kWidth);
      std::memcpy(out + m * F + p * kWidth, &sums[p][m], count * sizeof(float));
    }
  }
}

// The same for all panels of `columns` columns, kP at once while there are so many.
template <int kP, int kM, typename T>
void multiply_all(const typename Step<T>::Factor* x, const T* panels, float* out, int64_t steps, int64_t F,
                  int64_t columns) {
  const int64_t rows = steps * Step<T>::kRows;
  int64_t f = 0;
  for (; f + (kP - 1) * kWidth < columns; f += kP * kWidth) {
    multiply<kP, kM>(x, panels + f * rows, out + f, steps, F, columns - f);
  }
  if constexpr (kP > 1) {
    if (f < columns) multiply_all<kP / 2, kM>(x, panels + f * rows, out + f, steps, F, columns - f);
  }
}

constexpr int panels_at_once(int64_t rows) { return std::clamp<int64_t>(kTile / rows, 1, 8); }

template <typename T, size_t... kM>
constexpr auto by_rows(std::index_sequence<kM...>) {
  return std::array{&multiply_all<panels_at_once(kM + 1), kM + 1, T>...};
}

// A matrix as panels of 16 columns, [F / 16, D, 16], in bfloat16 [F / 16, D / 2, 32] with pairs of rows, and its
// product.
template <typename T, typename Out>
struct Matrix {
  const T* panels;
  Out* out;
  int64_t F;          // columns
  int64_t first;      // the number of its first chunk
  int64_t per_chunk;  // panels of a chunk

  int64_t num_panels() const { return (F + kWidth - 1) / kWidth; }
};

// out[m][f] = sum over d of x[m][d] * matrix[d][f], of each matrix.
template <typename T, typename Out>
ffi::Error product(ffi::ThreadPool& pool, int64_t threads, const ffi::AnyBuffer& xs, ffi::RemainingArgs& matrices,
                   ffi::RemainingRets& outs) {
  using Factor = typename Step<T>::Factor;
  constexpr auto kernels = by_rows<T>(std::make_index_sequence<kTile>());
  constexpr int64_t kRows = Step<T>::kRows;
  const int64_t D = xs.dimensions().back(), M = xs.element_count() / D;
  const int64_t tiles = (M + kTile - 1) / kTile, steps = (D - 1) / kRows + 1, at_once = panels_at_once(M);
  std::vector<Matrix<T, Out>> all;
  int64_t columns_of_all = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const auto matrix = matrices.get<ffi::AnyBuffer>(i);
    ffi::Result<ffi::AnyBuffer> out = *outs.get<ffi::AnyBuffer>(i);
    if (matrix->element_type() != xs.element_type()) {
      return ffi::Error::InvalidArgument("x and the matrix must have one dtype");
    }
    all.push_back({data<T>(*matrix), data<Out>(*out), out->dimensions().back(), 0, 0});
    columns_of_all += all.back().F;
    if (static_cast<int64_t>(matrix->element_count()) != all.back().num_panels() * kWidth * steps * kRows) {
      return ffi::Error::InvalidArgument(
          "the matrix must be [ceil(F / 16), D, 16], in bfloat16 [ceil(F / 16), ceil(D / 2), 32]");
    }
  }
  const T* const x = data<T>(xs);
  if (D * columns_of_all * (M + 4) < kSmall) threads = 1;
  static thread_local std::vector<Factor> scratch;  // x by tiles, [tile][step][row]
  scratch.resize(M * steps);
  Factor* const turned = scratch.data();
  auto rows_of = [&](int64_t t) { return std::min<int64_t>(kTile, M - t * kTile); };
  parallel(pool, M * D < kSmall / 64 ? 1 : threads, tiles, [&](int64_t t) {
    const T* const from = x + t * kTile * D;
    Factor* const to = turned + t * kTile * steps;
    for (int64_t m = 0, rows = rows_of(t); m < rows; ++m) {
      for (int64_t s = 0; s < steps; ++s) to[s * rows + m] = Step<T>::factor(from + m * D + s * kRows, D - s * kRows);
    }
  });
  const int64_t of_a_chunk = ((columns_of_all - 1) / kWidth / (kChunks * threads) / at_once + 1) * at_once;
  int64_t chunks = 0;
  for (auto& each : all) {
    each.first = chunks;
    each.per_chunk = of_a_chunk;
    chunks += (each.num_panels() + of_a_chunk - 1) / of_a_chunk;
  }
  parallel(pool, threads, chunks, [&](int64_t chunk) {
    auto found = all.rbegin();
    while (found->first > chunk) ++found;
    const Matrix<T, Out>& matrix = *found;
    const int64_t F = matrix.F, begin = (chunk - matrix.first) * matrix.per_chunk;
    const int64_t end = std::min(begin + matrix.per_chunk, matrix.num_panels());
    // A few panels for all rows, then the next: they stay in the cache.
    for (int64_t panel = begin; panel < end; panel += tiles > 1 ? 1 : matrix.per_chunk) {
      const int64_t f = panel * kWidth, last = tiles > 1 ? panel + 1 : end;
      for (int64_t t = 0; t < tiles; ++t) {
        Out* const to = matrix.out + t * kTile * F + f;
        const int64_t columns = std::min(last * kWidth, F) - f, rows = rows_of(t);
        auto multiplied = [&](float* sums, int64_t stride) {
          kernels[rows - 1](turned + t * kTile * steps, matrix.panels + f * steps * kRows, sums, steps, stride,
                            columns);
        };
        if constexpr (sizeof(Out) == sizeof(float)) {
          multiplied(to, F);
        } else {
          static thread_local std::vector<float> sums;
          sums.resize(rows * columns);
          multiplied(sums.data(), columns);
          for (int64_t m = 0; m < rows; ++m) {
            for (int64_t i = 0; i < columns; ++i) to[m * F + i] = rounded<Out>(sums[m * columns + i]);
          }
        }
      }
    }
  });
  return ffi::Error::Success();
}

ffi::Error product_of_any(ffi::ThreadPool pool, int64_t threads, ffi::AnyBuffer x, ffi::RemainingArgs panels,
                          ffi::RemainingRets outs) {
  return by_type(x, [&](auto type) {
    using T = decltype(type);
    ffi::Result<ffi::AnyBuffer> first = *outs.get<ffi::AnyBuffer>(0);
    const auto kernel = first->element_type() == ffi::F32 ? product<T, float> : product<T, T>;
    return kernel(pool, threads, x, panels, outs);
  });
}

// The gradient of a matrix: out[d][f] = sum over m of x[m][d] * y[m][f]. Rows are taken kDepth at a time, which are
// laid out for `multiply_tile`.
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
        for (int64_t m = 0; m < depth; ++m) store(load(from + m * width), to + m * kWidth);
      };
      for (int64_t d = 0; d < D; d += kBlock) lay_out(x.typed_data() + first * D + d, D, rows + d * depth);
      for (int64_t f = part * each * kWidth; f < std::min((part + 1) * each, panels) * kWidth; f += kWidth) {
        lay_out(y.typed_data() + first * F + f, F, panel);
        for (int64_t d = 0; d < D; d += kBlock) {
          float* const to = out->typed_data() + d * F + f;
          if (first == 0) {
            multiply_tile<true, false>(rows + d * depth, kBlock, panel, kWidth, depth, to, F);
          } else {
            multiply_tile<true, true>(rows + d * depth, kBlock, panel, kWidth, depth, to, F);
          }
        }
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(apr_product, product_of_any,
                              bind_threaded()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .RemainingArgs()        // panels of each matrix
                                  .RemainingRets());      // its product

XLA_FFI_DEFINE_HANDLER_SYMBOL(apr_outer, outer,
                              bind_threaded()
                                  .Arg<Floats>()    // x
                                  .Arg<Floats>()    // y
                                  .Ret<Floats>());  // out
