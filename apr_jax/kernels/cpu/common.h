// Vectors, numbers, threads and exp, for all kernels of CPUs.

#ifndef APR_JAX_KERNELS_CPU_COMMON_H_
#define APR_JAX_KERNELS_CPU_COMMON_H_

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;

constexpr int kWidth = 16;  // floats of a vector
constexpr int64_t kLine = 64;  // bytes that memory is asked for at once
// Below so many multiplications one thread finishes before a second one has woken up.
constexpr int64_t kSmall = 1 << 20;
constexpr float kLowest = -1e30f;  // finite, so that a difference of two is no NaN

// How XLA is told of a kernel that runs on several of its threads; its operands and results follow.
inline auto bind_threaded() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("threads"); }

struct Bfloat16 {
  uint16_t bits;
};

#ifdef __AVX512F__
typedef float Vector __attribute__((vector_size(kWidth * sizeof(float)), aligned(sizeof(float))));
typedef uint32_t Pairs __attribute__((vector_size(kWidth * sizeof(float)), aligned(sizeof(Bfloat16))));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

inline void store(const Vector& from, float* to) { std::memcpy(to, &from, sizeof(from)); }

// The first number of each of 16 pairs, or the second.
inline Vector load_half(const Bfloat16* from, bool second) {
  const Pairs pairs = *reinterpret_cast<const Pairs*>(from);
  return (Vector)(second ? pairs & 0xffff0000u : pairs << 16);
}

inline Vector held(const Vector& x) { return x; }
#else
// A vector that is longer than a register is kept in memory by GCC, so it comes in parts that fit one. All is done part
// by part, also loads and stores, since a whole struct is copied by way of memory.
#ifdef __AVX__
constexpr int kPart = 8;  // floats of a register
#else
constexpr int kPart = 4;
#endif
constexpr int kParts = kWidth / kPart;
typedef float Part __attribute__((vector_size(kPart * sizeof(float)), aligned(sizeof(float))));
typedef uint32_t Pairs __attribute__((vector_size(kPart * sizeof(float)), aligned(sizeof(Bfloat16))));

struct Vector {
  Part parts[kParts];
};

inline Vector operator+(Vector a, const Vector& b) {
  for (int i = 0; i < kParts; ++i) a.parts[i] += b.parts[i];
  return a;
}

inline Vector operator*(Vector a, const Vector& b) {
  for (int i = 0; i < kParts; ++i) a.parts[i] *= b.parts[i];
  return a;
}

inline Vector operator*(Vector a, float b) {
  for (int i = 0; i < kParts; ++i) a.parts[i] *= b;
  return a;
}

inline Vector load(const float* from) {
  Vector out;
  for (int i = 0; i < kParts; ++i) out.parts[i] = reinterpret_cast<const Part*>(from)[i];
  return out;
}

inline void store(const Vector& from, float* to) {
  for (int i = 0; i < kParts; ++i) reinterpret_cast<Part*>(to)[i] = from.parts[i];
}

// The first number of each of 16 pairs, or the second.
inline Vector load_half(const Bfloat16* from, bool second) {
  Vector out;
  for (int i = 0; i < kParts; ++i) {
    const Pairs pairs = reinterpret_cast<const Pairs*>(from)[i];
    out.parts[i] = (Part)(second ? pairs & 0xffff0000u : pairs << 16);
  }
  return out;
}

// The same vector, now in registers. Without this GCC reads it from memory for each of its uses, and reads are what a
// tile's loop waits for.
inline Vector held(Vector x) {
#ifdef __AVX__
  for (Part& part : x.parts) asm("" : "+x"(part));
#endif
  return x;
}
#endif

inline float number(float x) { return x; }

inline float number(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

// The nearest of a type's numbers, of two as near the even one.
template <typename T>
T rounded(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const uint32_t near = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return {static_cast<uint16_t>(x == x ? near : 0x7fc0)};
  }
}

template <typename T>
T* data(const ffi::AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// kernel(T()) for the type T of a buffer's elements.
template <typename Kernel>
ffi::Error by_type(const ffi::AnyBuffer& buffer, const Kernel& kernel) {
  switch (buffer.element_type()) {
    case ffi::F32:
      return kernel(float());
    case ffi::BF16:
      return kernel(Bfloat16());
    default:
      return ffi::Error::InvalidArgument("kernels are for float32 and bfloat16");
  }
}

// Calls task(0) ... task(count - 1), on this thread and on up to `threads - 1` of XLA's. Tasks are claimed one by one,
// so a thread that comes late finds nothing to do, and none is waited for that has not begun. Each thread begins with a
// range of its own: what it asks memory for ahead of a task is what it reads in the next one.
template <typename Task>
void parallel(ffi::ThreadPool& pool, int64_t threads, int64_t count, const Task& task) {
  threads = std::max<int64_t>(1, std::min(threads, count));
  struct Claims {
    explicit Claims(int64_t threads) : next(threads) {}
    std::vector<std::atomic<int64_t>> next;
    std::atomic<int64_t> done{0};
  };
  auto claims = std::make_shared<Claims>(threads);
  auto work = [claims, threads, count, &task](int64_t own) {
    for (int64_t turn = 0; turn < threads; ++turn) {
      const int64_t range = (own + turn) % threads, begin = range * count / threads;
      const int64_t end = (range + 1) * count / threads;
      for (int64_t index; (index = begin + claims->next[range].fetch_add(1)) < end; claims->done.fetch_add(1)) {
        task(index);
      }
    }
  };
  for (int64_t other = 1; other < threads; ++other) pool.Schedule([work, other] { work(other); });
  work(0);
  while (claims->done.load() < count) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
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

inline float sigmoid(float x) {
  const float e = exp_negative(-std::abs(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

#endif  // APR_JAX_KERNELS_CPU_COMMON_H_
