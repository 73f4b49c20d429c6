// Drawing a token from the logits of each row.
//
// Every sum is taken in an order that depends on its own row alone: not on other rows, nor on threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common.h"

namespace {

constexpr float kLeastTemperature = 1e-20f;  // below this a temperature counts as 0 (config_fields.py)
constexpr int64_t kPart = 256;  // tokens whose probabilities are added up first, as one sum

// One token of a row [V]: the likeliest below kLeastTemperature, else by inverse CDF at `uniform`, with its
// log-probability (of the likeliest that of temperature 1). Tokens that are banned or whose probability rounds to 0 are
// never drawn.
struct Draw {
  int64_t V;
  float temperature;
  const bool* banned;

  void operator()(const float* logits, float uniform, int32_t* token, float* logprob) const {
    static thread_local std::vector<float> scratch;
    const int64_t parts = (V + kPart - 1) / kPart;
    scratch.resize(2 * V + parts);
    float *const scaled = scratch.data(), *const weights = scaled + V, *const sums = weights + V;
    const bool greedy = !(temperature >= kLeastTemperature);
    const float divisor = greedy ? 1 : temperature;
    for (int64_t i = 0; i < V; ++i) scaled[i] = logits[i] / divisor;
    for (int64_t i = 0; i < V; ++i) scaled[i] = banned[i] ? kLowest : scaled[i];
    float top = kLowest;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < V; ++i) top = std::max(top, scaled[i]);
    float total = 0;
    for (int64_t part = 0; part < parts; ++part) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = part * kPart; i < std::min((part + 1) * kPart, V); ++i) {
        weights[i] = exp_negative(scaled[i] - top);
        sum += weights[i];
      }
      sums[part] = sum;
      total += sum;
    }
    const int64_t chosen = greedy ? std::find(scaled, scaled + V, top) - scaled
                                  : by_inverse_cdf(weights, sums, parts, uniform * total);
    *token = static_cast<int32_t>(chosen);
    *logprob = scaled[chosen] - top - std::log(total);
  }

  // The first token up to which there is more than `threshold`; where rounding leaves none, the last that adds some.
  int64_t by_inverse_cdf(const float* weights, const float* sums, int64_t parts, float threshold) const {
    int64_t part = -1;
    float before = 0, cumulative = 0;
    for (int64_t p = 0; p < parts && !(part >= 0 && cumulative > threshold); ++p) {
      if (!(sums[p] > 0)) continue;
      part = p;
      before = cumulative;
      cumulative += sums[p];
    }
    int64_t token = 0;
    cumulative = before;
    for (int64_t i = std::max<int64_t>(part, 0) * kPart, end = std::min(i + kPart, V); i < end; ++i) {
      if (!(weights[i] > 0)) continue;
      token = i;
      cumulative += weights[i];
      if (cumulative > threshold) break;
    }
    return token;
  }
};

ffi::Error draw(ffi::ThreadPool pool, int64_t threads, Floats logits, Floats temperature, ffi::Buffer<ffi::PRED> banned,
                Floats uniforms, ffi::ResultBuffer<ffi::S32> tokens, ffi::ResultBuffer<ffi::F32> logprobs) {
  const int64_t V = logits.dimensions().back(), rows = logits.element_count() / V;
  const Draw one{V, temperature.typed_data()[0], banned.typed_data()};
  parallel(pool, rows * V < kSmall / 16 ? 1 : threads, rows, [&](int64_t row) {
    one(logits.typed_data() + row * V, uniforms.typed_data()[row], tokens->typed_data() + row,
        logprobs->typed_data() + row);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(apr_draw, draw,
                              bind_threaded()
                                  .Arg<Floats>()                  // logits
                                  .Arg<Floats>()                  // temperature
                                  .Arg<ffi::Buffer<ffi::PRED>>()  // banned
                                  .Arg<Floats>()                  // uniforms
                                  .Ret<Integers>()                // tokens
                                  .Ret<Floats>());                // log-probabilities
