// Causal self-attention on a CPU, forward and backward, for gpt2/cpu.py:
//
//     P = softmax(Q K^T / sqrt(D)) over the keys start[t] ... t of query t,   O = P V
//
// on qkv (B, T, 3, H, D) as c_attn writes it, float32 or bfloat16; arithmetic is in float32. D is a
// multiple of LINE, 16. A thread takes one head of one row of the batch: it copies its Q, K, V, and
// transposes of those that a product needs so, and goes through blocks of QUERIES queries, whose
// scores against all their keys it holds at once, in its L2 cache. Backward computes P again from
// the scores and their log-sum-exp:
//
//     dV = P^T dO,  dP = dO V^T,  dS = P (dP - rowsum(dO O)),  dQ = dS K,  dK = dS^T Q
//
// All products are one function: rows of a result, a few vectors wide, that stay in registers.

#include "cpu_kernels.h"
#include "cpu_math.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int64_t QUERIES = 32;
constexpr int64_t LINE = 16;  // floats; D is a multiple of it, and so are the widths of all buffers

// c (rows, columns) = [c +] a b; a's element (r, k) lies at r * a_row + k * a_k; columns is a
// multiple of LINE. A vector of the processor has LANES floats. A tile of c that is WIDEST vectors wide
// and 6 rows high stays in registers, or one that is narrower and 12 rows high.
template <int LANES, int WIDEST>
struct Product {
  typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

  template <int R, int V>
  static INLINE void tile(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_row,
                          float* c, int64_t c_row, int64_t n_k, bool add) {
    Vector acc[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = Vector{};
    for (int64_t k = 0; k < n_k; ++k) {
      Vector bs[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        bs[v] = *reinterpret_cast<const Vector*>(b + k * b_row + v * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const float scalar = a[r * a_row + k * a_k];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] += scalar * bs[v];
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        Vector* to = reinterpret_cast<Vector*>(c + r * c_row + v * LANES);
        *to = add ? *to + acc[r][v] : acc[r][v];
      }
  }

  template <int V>
  static INLINE int64_t columns(int64_t j, const float* a, int64_t a_row, int64_t a_k,
                                const float* b, int64_t b_row, float* c, int64_t c_row,
                                int64_t rows, int64_t n_columns, int64_t n_k, bool add) {
    constexpr int R = V == WIDEST ? 6 : 12;
    for (; j + V * LANES <= n_columns; j += V * LANES) {
      int64_t r = 0;
      for (; r + R <= rows; r += R)
        tile<R, V>(a + r * a_row, a_row, a_k, b + j, b_row, c + r * c_row + j, c_row, n_k, add);
      for (; r < rows; ++r)
        tile<1, V>(a + r * a_row, a_row, a_k, b + j, b_row, c + r * c_row + j, c_row, n_k, add);
    }
    return j;
  }

  static INLINE void run(const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_row,
                         float* c, int64_t c_row, int64_t rows, int64_t n_columns, int64_t n_k,
                         bool add) {
    int64_t j = columns<WIDEST>(0, a, a_row, a_k, b, b_row, c, c_row, rows, n_columns, n_k, add);
    j = columns<WIDEST / 2>(j, a, a_row, a_k, b, b_row, c, c_row, rows, n_columns, n_k, add);
    columns<1>(j, a, a_row, a_k, b, b_row, c, c_row, rows, n_columns, n_k, add);
  }
};

struct Shape {
  int64_t T, H, D;
  float scale;
};

// The first key that query t sees; a query whose own lies after itself sees nothing.
INLINE int64_t first_key(const int32_t* start, int64_t t, const Shape& s) {
  return start ? std::clamp<int64_t>(start[t], 0, s.T) : 0;
}

// Where the buffers of a block of n queries begin: at a key that none of them sees less than.
INLINE int64_t first_of_block(const int32_t* start, int64_t q0, int64_t n, const Shape& s) {
  int64_t first = q0;
  for (int64_t r = 0; r < n; ++r) first = std::min(first, first_key(start, q0 + r, s));
  return first / LINE * LINE;
}

INLINE int64_t padded(int64_t T) { return (T + LINE - 1) / LINE * LINE; }

template <typename T>
INLINE void copy_in(const T* from, int64_t row, int64_t n, int64_t D, float* to) {
  for (int64_t t = 0; t < n; ++t)
    for (int64_t d = 0; d < D; ++d) to[t * D + d] = load(from + t * row + d);
}

INLINE void transpose(const float* from, int64_t n, int64_t D, float* to, int64_t to_row) {
  for (int64_t t = 0; t < n; t += LINE)
    for (int64_t d = 0; d < D; ++d)
      for (int64_t i = t; i < std::min(t + LINE, n); ++i) to[d * to_row + i] = from[i * D + d];
}

template <typename P, typename T>
INLINE void forward_head(const T* qkv, const int32_t* start, T* out, float* lse, const Shape& s,
                         float* work) {
  const int64_t D = s.D, wide_row = padded(s.T), row = 3 * s.H * D;
  float *q = work, *v = q + s.T * D, *kt = v + s.T * D, *p = kt + D * wide_row,
        *o = p + QUERIES * wide_row;
  copy_in(qkv + s.H * D, row, s.T, D, q);  // K, for a moment
  transpose(q, s.T, D, kt, wide_row);
  copy_in(qkv, row, s.T, D, q);
  copy_in(qkv + 2 * s.H * D, row, s.T, D, v);
  for (int64_t q0 = 0; q0 < s.T; q0 += QUERIES) {
    const int64_t n = std::min(QUERIES, s.T - q0), k0 = first_of_block(start, q0, n, s);
    const int64_t keys = q0 + n - k0, wide = padded(keys);
    P::run(q + q0 * D, D, 1, kt + k0, wide_row, p, wide_row, n, wide, D, false);
    for (int64_t r = 0; r < n; ++r) {
      float* z = p + r * wide_row;
      const int64_t first = first_key(start, q0 + r, s) - k0, end = q0 + r + 1 - k0;
      float top = z[first];
#pragma omp simd reduction(max : top)
      for (int64_t i = first; i < end; ++i) top = std::max(top, z[i]);
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = first; i < end; ++i) {
        z[i] = exponential((z[i] - top) * s.scale);
        sum += z[i];
      }
      lse[q0 + r] = top * s.scale + std::log(sum);
      std::fill(z, z + first, 0.0f);
      std::fill(z + end, z + keys, 0.0f);
      const float norm = 1.0f / sum;
#pragma omp simd
      for (int64_t i = first; i < end; ++i) z[i] *= norm;
    }
    P::run(p, wide_row, 1, v + k0 * D, D, o, D, n, D, keys, false);
    for (int64_t r = 0; r < n; ++r)
      for (int64_t d = 0; d < D; ++d) store(out + (q0 + r) * s.H * D + d, o[r * D + d]);
  }
}

template <typename P, typename T>
INLINE void backward_head(const T* qkv, const int32_t* start, const T* out, const T* dout,
                          const float* lse, T* dqkv, const Shape& s, float* work) {
  const int64_t D = s.D, wide_row = padded(s.T), row = 3 * s.H * D, all = s.T * D;
  float *q = work, *k = q + all, *kt = k + all, *vt = kt + D * wide_row, *dk = vt + D * wide_row,
        *dv = dk + all, *p = dv + all, *ds = p + QUERIES * wide_row, *d_o = ds + QUERIES * wide_row,
        *dq = d_o + QUERIES * D;
  copy_in(qkv + 2 * s.H * D, row, s.T, D, q);  // V, for a moment
  transpose(q, s.T, D, vt, wide_row);
  copy_in(qkv, row, s.T, D, q);
  copy_in(qkv + s.H * D, row, s.T, D, k);
  transpose(k, s.T, D, kt, wide_row);
  std::fill(dk, dk + 2 * all, 0.0f);
  for (int64_t q0 = 0; q0 < s.T; q0 += QUERIES) {
    const int64_t n = std::min(QUERIES, s.T - q0), k0 = first_of_block(start, q0, n, s);
    const int64_t keys = q0 + n - k0, wide = padded(keys);
    copy_in(dout + q0 * s.H * D, s.H * D, n, D, d_o);
    P::run(q + q0 * D, D, 1, kt + k0, wide_row, p, wide_row, n, wide, D, false);
    P::run(d_o, D, 1, vt + k0, wide_row, ds, wide_row, n, wide, D, false);
    for (int64_t r = 0; r < n; ++r) {
      float *z = p + r * wide_row, *g = ds + r * wide_row;
      const int64_t first = first_key(start, q0 + r, s) - k0, end = q0 + r + 1 - k0;
      const T* o = out + (q0 + r) * s.H * D;
      float delta = 0.0f;
#pragma omp simd reduction(+ : delta)
      for (int64_t d = 0; d < D; ++d) delta += d_o[r * D + d] * load(o + d);
      const float norm = lse[q0 + r], scale = s.scale;
#pragma omp simd
      for (int64_t i = first; i < end; ++i) {
        z[i] = exponential(z[i] * scale - norm);
        g[i] = z[i] * (g[i] - delta) * scale;
      }
      for (float* x : {z, g}) {
        std::fill(x, x + first, 0.0f);
        std::fill(x + end, x + keys, 0.0f);
      }
    }
    P::run(ds, wide_row, 1, k + k0 * D, D, dq, D, n, D, keys, false);
    for (int64_t r = 0; r < n; ++r)
      for (int64_t d = 0; d < D; ++d) store(dqkv + (q0 + r) * row + d, dq[r * D + d]);
    P::run(ds, 1, wide_row, q + q0 * D, D, dk + k0 * D, D, keys, D, n, true);
    P::run(p, 1, wide_row, d_o, D, dv + k0 * D, D, keys, D, n, true);
  }
  for (int64_t t = 0; t < s.T; ++t)
    for (int64_t d = 0; d < D; ++d) {
      store(dqkv + t * row + s.H * D + d, dk[t * D + d]);
      store(dqkv + t * row + 2 * s.H * D + d, dv[t * D + d]);
    }
}

#define HEAD(SUFFIX, TARGET, P)                                                                  \
  template <typename T>                                                                          \
  TARGET void forward_##SUFFIX(const T* qkv, const int32_t* start, T* out, float* lse,           \
                               const Shape& s, float* work) {                                    \
    forward_head<P>(qkv, start, out, lse, s, work);                                              \
  }                                                                                              \
  template <typename T>                                                                          \
  TARGET void backward_##SUFFIX(const T* qkv, const int32_t* start, const T* out, const T* dout, \
                                const float* lse, T* dqkv, const Shape& s, float* work) {        \
    backward_head<P>(qkv, start, out, dout, lse, dqkv, s, work);                                 \
  }
typedef Product<4, 2> Lanes4;
typedef Product<8, 2> Lanes8;
typedef Product<16, 4> Lanes16;
HEAD(any, , Lanes4)
#if HAS_LEVELS
HEAD(v3, V3, Lanes8)
HEAD(v4, V4, Lanes16)
#endif

}  // namespace

template <typename T>
void attention(const T* qkv, const int32_t* start, T* out, float* lse, int64_t B, int64_t length,
               int64_t H, int64_t D, int threads) {
  const Shape s{length, H, D, 1.0f / std::sqrt(float(D))};
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> work(2 * length * D + (D + QUERIES) * padded(length) + QUERIES * D);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < B * H; ++i) {
      const int64_t b = i / H, at = b * length * H * D + i % H * D;
      const T* head = qkv + b * length * 3 * H * D + i % H * D;
      const int32_t* first = start ? start + b * length : nullptr;
      BEST(forward, head, first, out + at, lse + i * length, s, work.data())
    }
  }
}

template <typename T>
void attention_backward(const T* qkv, const int32_t* start, const T* out, const T* dout,
                        const float* lse, T* dqkv, int64_t B, int64_t length, int64_t H, int64_t D,
                        int threads) {
  const Shape s{length, H, D, 1.0f / std::sqrt(float(D))};
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> work(4 * length * D + (2 * D + 2 * QUERIES) * padded(length) +
                            2 * QUERIES * D);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < B * H; ++i) {
      const int64_t b = i / H, at = b * length * H * D + i % H * D;
      const int64_t head = b * length * 3 * H * D + i % H * D;
      const int32_t* first = start ? start + b * length : nullptr;
      BEST(backward, qkv + head, first, out + at, dout + at, lse + i * length, dqkv + head, s,
           work.data())
    }
  }
}

#define FOR(T)                                                                                    \
  template void attention(const T*, const int32_t*, T*, float*, int64_t, int64_t, int64_t,        \
                          int64_t, int);                                                          \
  template void attention_backward(const T*, const int32_t*, const T*, const T*, const float*,    \
                                   T*, int64_t, int64_t, int64_t, int64_t, int);
FOR(float)
FOR(bfloat16)
