// Products of 16 rows and 16 columns, whose sums stay in registers.

#ifndef APR_JAX_KERNELS_CPU_TILE_H_
#define APR_JAX_KERNELS_CPU_TILE_H_

#include <cstdint>

#include "common.h"

constexpr int kBlock = kWidth;  // rows of a tile, one to a place of a vector
#ifdef __AVX512F__
constexpr int kRows = 16;  // of a tile's sums that stay in registers
#else
constexpr int kRows = 4;
#endif

// 16 rows of 16 columns: out[m][i] = sum over d of a[m][d] * b[d][i], or that is added to what is there. kTurned: `a`
// comes as [d][m]. Strides are floats from one row of memory to the next.
template <bool kTurned, bool kAdd>
inline __attribute__((always_inline)) void multiply_tile(const float* a, int64_t a_stride, const float* b,
                                                         int64_t b_stride, int64_t depth, float* out,
                                                         int64_t out_stride) {
  for (int first = 0; first < kBlock; first += kRows) {
    Vector sums[kRows];
    for (int m = 0; m < kRows; ++m) sums[m] = kAdd ? load(out + (first + m) * out_stride) : Vector{};
    for (int64_t d = 0; d < depth; ++d) {
      const float* const from = a + (kTurned ? first + d * a_stride : first * a_stride + d);
      const Vector columns = held(load(b + d * b_stride));
      for (int m = 0; m < kRows; ++m) sums[m] = sums[m] + columns * from[kTurned ? m : m * a_stride];
    }
    for (int m = 0; m < kRows; ++m) store(sums[m], out + (first + m) * out_stride);
  }
}

#endif  // APR_JAX_KERNELS_CPU_TILE_H_
