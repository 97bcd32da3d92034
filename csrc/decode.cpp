// One token of generation on a CPU, all of GPT-2 for a few rows, for gpt2/cpu.py.
//
// Every weight is read once and used for all rows, so for few rows the time is that of reading the
// weights. A core that reads one stream of consecutive addresses gets about half of the memory's
// bandwidth on the machine this was written on, and a few rows that lie next to each other are one
// stream. So a matrix w is read as four streams that are far apart: its rows n, n + N/4, n + N/2 and
// n + 3N/4 together. For more rows of x than a tile has they are read again from the L1 cache.
//
// Activations are float32 and so are all sums, in the same order however many rows there are: a
// row's result does not depend on the other rows.

#include "cpu_kernels.h"
#include "cpu_math.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int STREAMS = 4;
constexpr int64_t AHEAD = 512;  // bytes that each stream is prefetched ahead

// So many of the threads as have work of 2^15 multiplications each: waking one takes microseconds.
int crew(int64_t work, int threads) {
  return int(std::clamp<int64_t>(work >> 15, 1, threads));
}

// y (M, N) [+]= x (M, K) w (N, K)^T + bias (N)
template <typename T>
struct Linear {
  const float* x;
  const T *w, *bias;
  float* y;
  int64_t M, N, K;
  bool add;
};

// A vector of the processor has LANES floats; a tile has at most MOST rows of x.
template <int LANES, int MOST>
struct Tiles {
  typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

  static INLINE void take(Vector& v, const float* p) { v = *reinterpret_cast<const Vector*>(p); }
  static INLINE void take(Vector& v, const bfloat16* p) {
    uint32_t bits[LANES];
    for (int i = 0; i < LANES; ++i) bits[i] = uint32_t(p[i].bits) << 16;
    std::memcpy(&v, bits, sizeof v);
  }

  static INLINE float sum(const Vector& v) {
    float part[LANES];
    *reinterpret_cast<Vector*>(part) = v;
#pragma GCC unroll 4
    for (int n = LANES / 2; n; n /= 2)
      for (int i = 0; i < n; ++i) part[i] += part[i + n];
    return part[0];
  }

  // Rows m, m + 1, ... of x times rows n, n + far, ... of w.
  template <int ROWS, int COLUMNS, typename T>
  static INLINE void tile(const Linear<T>& a, int64_t m, int64_t n, int64_t far) {
    const float* x = a.x + m * a.K;
    const T* w = a.w + n * a.K;
    Vector acc[ROWS][COLUMNS] = {};
    int64_t k = 0;
    for (; k + LANES <= a.K; k += LANES) {
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) {
        const T* at = w + c * far * a.K + k;
        __builtin_prefetch(reinterpret_cast<const char*>(at) + AHEAD);  // past the end: harmless
        Vector weight, value;
        take(weight, at);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          take(value, x + r * a.K + k);
          acc[r][c] += value * weight;
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) {
        float total = sum(acc[r][c]);
        for (int64_t i = k; i < a.K; ++i) total += x[r * a.K + i] * load(w + c * far * a.K + i);
        if (a.bias) total += load(a.bias + n + c * far);
        float* y = a.y + (m + r) * a.N + n + c * far;
        *y = a.add ? *y + total : total;
      }
    }
  }

  template <int COLUMNS, typename T>
  static INLINE void rows(const Linear<T>& a, int64_t n, int64_t far) {
    int64_t m = 0;
    for (; m + MOST <= a.M; m += MOST) tile<MOST, COLUMNS>(a, m, n, far);
    if (a.M - m == 3) tile<3, COLUMNS>(a, m, n, far);
    if (a.M - m == 2) tile<2, COLUMNS>(a, m, n, far);
    if (a.M - m == 1) tile<1, COLUMNS>(a, m, n, far);
  }

  // The part of a linear layer that is thread i's of n_threads.
  template <typename T>
  static INLINE void run(const Linear<T>& a, int64_t i, int64_t n_threads) {
    const int64_t far = a.N / STREAMS;
    for (int64_t n = far * i / n_threads; n < far * (i + 1) / n_threads; ++n)
      rows<STREAMS>(a, n, far);
    if (i == 0)
      for (int64_t n = far * STREAMS; n < a.N; ++n) rows<1>(a, n, 0);
  }
};

#define PART(SUFFIX, TARGET, LANES, MOST)                                       \
  template <typename T>                                                         \
  TARGET void part_##SUFFIX(const Linear<T>& a, int64_t i, int64_t n_threads) { \
    Tiles<LANES, MOST>::run(a, i, n_threads);                                   \
  }
PART(any, , 4, 3)
#if HAS_LEVELS
PART(v3, V3, 8, 3)
PART(v4, V4, 16, 4)
#endif

template <typename T>
void linear(const Linear<T>& a, int threads) {
  const int n = crew(a.M * a.N * a.K, threads);
#pragma omp parallel for num_threads(n) schedule(static) if (n > 1)
  for (int i = 0; i < n; ++i) {
    BEST(part, a, i, n)
  }
}

// y = (x - mean) / sqrt(variance + 1e-5) w + b, of one row
VERSIONS void layer_norm(const float* x, const float* w, const float* b, float* y, int64_t C) {
  float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < C; ++i) sum += x[i];
  const float mean = sum / float(C);
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < C; ++i) squares += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt(squares / float(C) + 1e-5f);
#pragma omp simd
  for (int64_t i = 0; i < C; ++i) y[i] = (x[i] - mean) * scale * w[i] + (b ? b[i] : 0.0f);
}

// out (D) = softmax(q keys^T / sqrt(D)) values over the keys first ... last, for one head.
VERSIONS void attend(const float* q, const float* keys, const float* values, int64_t first,
                     int64_t last, int64_t D, float* out, float* p) {
  const float scale = 1.0f / std::sqrt(float(D));
  float top = -INFINITY, sum = 0.0f;
  for (int64_t j = first; j <= last; ++j) {
    float score = 0.0f;
#pragma omp simd reduction(+ : score)
    for (int64_t d = 0; d < D; ++d) score += q[d] * keys[j * D + d];
    p[j] = score * scale;
    top = std::max(top, p[j]);
  }
#pragma omp simd reduction(+ : sum)
  for (int64_t j = first; j <= last; ++j) {
    p[j] = exponential(p[j] - top);
    sum += p[j];
  }
  std::fill(out, out + D, 0.0f);
  for (int64_t j = first; j <= last; ++j) {
    const float weight = p[j] / sum;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) out[d] += weight * values[j * D + d];
  }
}

}  // namespace

template <typename T>
void decode(const void* const* weights, float* x, float* cache, const int32_t* start, float* logits,
            int64_t n_layer, int64_t B, int64_t H, int64_t C, int64_t capacity, int64_t length,
            int64_t n_classes, int threads) {
  const int64_t D = C / H, size = B * H * capacity * D;
  std::vector<float> h(B * C), wide(4 * B * C), scores(B * H * (length + 1));
  const auto norm = [&] {
    const auto *w = static_cast<const float*>(weights[0]), *b = static_cast<const float*>(weights[1]);
    for (int64_t r = 0; r < B; ++r) layer_norm(x + r * C, w, b, h.data() + r * C, C);
    weights += 2;
  };
  const auto product = [&](const float* from, float* to, int64_t n_out, int64_t n_in, bool add) {
    const auto *w = static_cast<const T*>(weights[0]), *b = static_cast<const T*>(weights[1]);
    linear(Linear<T>{from, w, b, to, B, n_out, n_in, add}, threads);
    weights += 2;
  };
  for (int64_t layer = 0; layer < n_layer; ++layer) {
    float *keys = cache + 2 * layer * size, *values = keys + size;  // (B, H, capacity, D)
    norm();
    product(h.data(), wide.data(), 3 * C, C, false);
    const int n = crew(2 * B * C * length, threads);
#pragma omp parallel for num_threads(n) schedule(static) if (n > 1)
    for (int64_t i = 0; i < B * H; ++i) {
      const float* q = wide.data() + i / H * 3 * C + i % H * D;
      float *k = keys + i * capacity * D, *v = values + i * capacity * D;
      std::copy(q + C, q + C + D, k + length * D);
      std::copy(q + 2 * C, q + 2 * C + D, v + length * D);
      attend(q, k, v, start ? start[i / H] : 0, length, D, h.data() + i * D,
             scores.data() + i * (length + 1));
    }
    product(h.data(), x, C, C, true);
    norm();
    product(h.data(), wide.data(), 4 * C, C, false);
    gelu(wide.data(), wide.data(), 4 * B * C, crew(64 * B * C, threads));
    product(wide.data(), x, C, 4 * C, true);
  }
  norm();
  product(h.data(), logits, n_classes, C, false);
}

template void decode<float>(const void* const*, float*, float*, const int32_t*, float*, int64_t,
                            int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int);
template void decode<bfloat16>(const void* const*, float*, float*, const int32_t*, float*, int64_t,
                               int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int);
