// Attention within the segments of packed training rows, forward and backward.
//
// Every sum is taken in an order that depends on its own row alone: not on other rows, nor on threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common.h"
#include "tile.h"

namespace {

// 16 rows of H elements, side by side element by element: [H][16].
void turn(const float* rows, int64_t stride, int64_t H, float scale, float* out) {
  for (int64_t h = 0; h < H; ++h) {
    for (int m = 0; m < kBlock; ++m) out[h * kBlock + m] = rows[m * stride + h] * scale;
  }
}

// Queries, keys and values [B, T, heads, H] of one task: a row of the batch and one key/value head, whose queries'
// heads are G. Scores and their like are held by key: [key][query of the block].
struct Rows {
  int64_t T, H, G, query_stride, key_stride;  // floats from one token to the next
  float scale;
  const int32_t* first;  // of each token, the first that it sees
  const int32_t* ends;   // of each token, the first later one that does not see it

  int64_t begin(int64_t block) const { return first[block] / kBlock * kBlock; }

  // Whether no query of a block sees any of 16 keys: they are of branches that have ended.
  bool hidden(int64_t key, int64_t block) const { return *std::max_element(ends + key, ends + key + kBlock) <= block; }

  // Keys `begin` .. of a block of queries, turned, times the block's queries, turned; those out of sight get `kLowest`.
  void scores(const float* turned_keys, const float* turned_queries, int64_t block, float* out) const {
    for (int64_t key = begin(block); key <= block; key += kBlock, out += kBlock * kBlock) {
      if (hidden(key, block)) {
        std::fill_n(out, kBlock * kBlock, kLowest);
        continue;
      }
      multiply_tile<true, false>(turned_keys + key * H, kBlock, turned_queries, kBlock, H, out, kBlock);
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
        multiply_tile<true, false>(scores, kBlock, v + begin * rows.key_stride + h, rows.key_stride, length, to + h,
                                   rows.query_stride);
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
        multiply_tile<true, false>(values + (begin + j) * H, kBlock, douts, kBlock, H, tile, kBlock);
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
        multiply_tile<true, false>(dscores, kBlock, k + begin * rows.key_stride + h, rows.key_stride, length,
                                   dq + at + h, stride);
        for (int64_t j = 0; j < length; j += kBlock) {
          if (rows.hidden(begin + j, block)) continue;
          const int64_t to = (begin + j) * rows.key_stride + h;
          multiply_tile<false, true>(dscores + j * kBlock, kBlock, q + at + h, stride, kBlock, dk + to,
                                     rows.key_stride);
          multiply_tile<false, true>(weights + j * kBlock, kBlock, dout + at + h, stride, kBlock, dv + to,
                                     rows.key_stride);
        }
      }
    }
  }
}

// Calls task(rows, where its queries begin, where its keys, where its logarithms, scratch) for each row and key/value
// head.
template <typename Task>
ffi::Error for_each_head(ffi::ThreadPool& pool, int64_t threads, const Floats& q, const Floats& k,
                         const Integers& first, const Integers& ends, const Task& task) {
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

ffi::Error attention(ffi::ThreadPool pool, int64_t threads, Floats q, Floats k, Floats v, Integers first, Integers ends,
                     ffi::Result<Floats> out, ffi::Result<Floats> logs) {
  return for_each_head(pool, threads, q, k, first, ends,
                       [&](const Rows& rows, int64_t query, int64_t key, int64_t log, float* scratch) {
                         attend(rows, q.typed_data() + query, k.typed_data() + key, v.typed_data() + key,
                                out->typed_data() + query, logs->typed_data() + log, scratch);
                       });
}

ffi::Error attention_backward(ffi::ThreadPool pool, int64_t threads, Floats q, Floats k, Floats v, Integers first,
                              Integers ends, Floats out, Floats logs, Floats dout, ffi::Result<Floats> dq,
                              ffi::Result<Floats> dk, ffi::Result<Floats> dv) {
  return for_each_head(
      pool, threads, q, k, first, ends, [&](const Rows& rows, int64_t query, int64_t key, int64_t log, float* scratch) {
        attend_backward(rows, q.typed_data() + query, k.typed_data() + key, v.typed_data() + key,
                        out.typed_data() + query, logs.typed_data() + log, dout.typed_data() + query,
                        dq->typed_data() + query, dk->typed_data() + key, dv->typed_data() + key, scratch);
      });
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
