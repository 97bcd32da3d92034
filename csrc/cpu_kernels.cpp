// What lies between the matrix products of a training step on a CPU, for gpt2/cpu.py:
//
//     gelu            y = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3), which is GELU's tanh form
//     gelu_backward   dx = dy dy/dx
//     cross_entropy   the loss of each row of logits, which become their own gradient
//
// on float32 or bfloat16 (the upper half of a float32); arithmetic is in float32. The compiler makes
// the vector code: plain loops over functions without branches, one version for each level of x86-64,
// of which the processor takes the best. Threads are OpenMP's. torch links libgomp.so.1 too and is
// loaded first, so they are its threads.

#include "cpu_kernels.h"
#include "cpu_math.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

constexpr float TWO_ROOT = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float CUBE = 0.044715f;

// e^-2u, of which sigmoid(2u) is 1 / (1 + e^-2u).
INLINE float exponential_2u(float x) { return exponential(-TWO_ROOT * (x + CUBE * x * x * x)); }

template <typename T>
INLINE void gelu_block(const T* x, T* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float v = load(x + i);
    store(y + i, v / (1.0f + exponential_2u(v)));
  }
}

template <typename T>
INLINE void gelu_backward_block(const T* x, const T* dy, T* dx, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float v = load(x + i), e = exponential_2u(v), s = 1.0f / (1.0f + e);
    // 1 - s is e s without cancellation, as long as e is finite
    const float rest = e < 1e30f ? e * s : 1.0f;
    const float slope = s + v * s * rest * TWO_ROOT * (1.0f + 3.0f * CUBE * v * v);
    store(dx + i, load(dy + i) * slope);
  }
}

// The loss of one row z of n_classes logits, n in memory: log(sum exp(z)) - z[target]. gradient: z
// becomes softmax(z) - [j = target], and 0 from n_classes on. A target below 0 does not count.
template <typename T>
INLINE float cross_entropy_row(T* z, int64_t target, int64_t n_classes, int64_t n, bool gradient) {
  if (target < 0) {
    if (gradient) std::memset(static_cast<void*>(z), 0, n * sizeof(T));
    return 0.0f;
  }
  float top = load(z);
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n_classes; ++i) top = std::max(top, load(z + i));
  float sum = 0.0f;
  for (int64_t start = 0; start < n_classes; start += 1024) {  // keeps the rounding small
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = start; i < std::min(start + 1024, n_classes); ++i)
      part += exponential(load(z + i) - top);
    sum += part;
  }
  const float lse = top + std::log(sum), z_target = load(z + target);
  if (gradient) {
    const float scale = 1.0f / sum;
#pragma omp simd
    for (int64_t i = 0; i < n_classes; ++i) store(z + i, exponential(load(z + i) - top) * scale);
    store(z + target, exponential(z_target - top) * scale - 1.0f);
    std::memset(static_cast<void*>(z + n_classes), 0, (n - n_classes) * sizeof(T));
  }
  return lse - z_target;
}

VERSIONS void gelu_part(const float* x, float* y, int64_t n) { gelu_block(x, y, n); }
VERSIONS void gelu_part(const bfloat16* x, bfloat16* y, int64_t n) { gelu_block(x, y, n); }

VERSIONS void gelu_backward_part(const float* x, const float* dy, float* dx, int64_t n) {
  gelu_backward_block(x, dy, dx, n);
}
VERSIONS void gelu_backward_part(const bfloat16* x, const bfloat16* dy, bfloat16* dx, int64_t n) {
  gelu_backward_block(x, dy, dx, n);
}

VERSIONS float row(float* z, int64_t target, int64_t n_classes, int64_t n, bool gradient) {
  return cross_entropy_row(z, target, n_classes, n, gradient);
}
VERSIONS float row(bfloat16* z, int64_t target, int64_t n_classes, int64_t n, bool gradient) {
  return cross_entropy_row(z, target, n_classes, n, gradient);
}

constexpr int64_t PART = 4096;  // elements that a thread takes at a time

}  // namespace

template <typename T>
void gelu(const T* x, T* y, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t start = 0; start < n; start += PART)
    gelu_part(x + start, y + start, std::min(PART, n - start));
}

template <typename T>
void gelu_backward(const T* x, const T* dy, T* dx, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t start = 0; start < n; start += PART)
    gelu_backward_part(x + start, dy + start, dx + start, std::min(PART, n - start));
}

template <typename T>
void cross_entropy(T* z, const int64_t* targets, float* losses, int64_t rows, int64_t n_classes,
                   int64_t n, bool gradient, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    losses[r] = row(z + r * n, targets[r], n_classes, n, gradient);
}

template void gelu(const float*, float*, int64_t, int);
template void gelu(const bfloat16*, bfloat16*, int64_t, int);
template void gelu_backward(const float*, const float*, float*, int64_t, int);
template void gelu_backward(const bfloat16*, const bfloat16*, bfloat16*, int64_t, int);
template void cross_entropy(float*, const int64_t*, float*, int64_t, int64_t, int64_t, bool, int);
template void cross_entropy(bfloat16*, const int64_t*, float*, int64_t, int64_t, int64_t, bool, int);
