// Linear layers for a decode step on a CPU, where x has a few rows only.
//
//     y (M, N) = x (M, K) w (N, K)^T + bias (N),   all contiguous, float32 or all bfloat16
//
// Every weight is read once and used M times, so for small M the time is that of reading w. A core
// that reads one stream of consecutive addresses gets about half of the memory's bandwidth on the
// machine this was written on, and a few rows that lie next to each other are one stream. So w is
// read as four streams that are far apart: rows n, n + N/4, n + N/2 and n + 3N/4 together. For M > 3
// they are read again from the L1 cache for the next three rows of x.
//
// Each y is the sum over k in the same order whatever M is, in float32, so a row's result does not
// depend on the other rows.
//
// Threads are OpenMP's. torch links libgomp.so.1 too and is loaded first, so they are its threads.

#include "cpu_math.h"

#include <stdexcept>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_KERNEL 1
#define AVX2 __attribute__((target("avx2,fma")))
#else
#define HAS_KERNEL 0
#endif

namespace {

#if HAS_KERNEL
constexpr int LANES = 8;
constexpr int STREAMS = 4;
constexpr int64_t AHEAD = 512;  // bytes that each stream is prefetched ahead: eight cache lines

AVX2 inline __m256 load_lanes(const float* p) { return _mm256_loadu_ps(p); }

AVX2 inline __m256 load_lanes(const bfloat16* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

AVX2 inline float sum(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// ROWS rows of x (apart by K) times COLUMNS rows of w (apart by far * K), into y (apart by N and
// far).
template <int ROWS, int COLUMNS, typename T>
AVX2 inline void tile(const float* x, const T* w, const T* bias, T* y, int64_t N, int64_t K,
                      int64_t far) {
  __m256 acc[ROWS][COLUMNS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) acc[r][c] = _mm256_setzero_ps();
  int64_t k = 0;
  for (; k + LANES <= K; k += LANES) {
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) {
      const T* at = w + c * far * K + k;
      // Prefetching past the end of w is harmless.
      _mm_prefetch(reinterpret_cast<const char*>(at) + AHEAD, _MM_HINT_T0);
      const __m256 weight = load_lanes(at);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r)
        acc[r][c] = _mm256_fmadd_ps(_mm256_loadu_ps(x + r * K + k), weight, acc[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) {
      float total = sum(acc[r][c]);
      for (int64_t rest = k; rest < K; ++rest) {
        total += x[r * K + rest] * load(w + c * far * K + rest);
      }
      store(y + r * N + c * far, total + (bias ? load(bias + c * far) : 0.0f));
    }
  }
}

// All M rows of x times the rows n, n + far, ... of w.
template <int COLUMNS, typename T>
AVX2 void columns(const float* x, const T* w, const T* bias, T* y, int64_t M, int64_t N, int64_t K,
                  int64_t n, int64_t far) {
  w += n * K;
  y += n;
  if (bias) bias += n;
  int64_t m = 0;
  for (; m + 3 <= M; m += 3) tile<3, COLUMNS>(x + m * K, w, bias, y + m * N, N, K, far);
  if (M - m == 2) tile<2, COLUMNS>(x + m * K, w, bias, y + m * N, N, K, far);
  if (M - m == 1) tile<1, COLUMNS>(x + m * K, w, bias, y + m * N, N, K, far);
}

}  // namespace

template <typename T>
AVX2 void decode_linear(const T* rows, const T* w, const T* bias, T* y, int64_t M, int64_t N,
                        int64_t K, int n_threads) {
  std::vector<float> floats(M * K);
  for (int64_t i = 0; i < M * K; ++i) floats[i] = load(rows + i);
  const float* x = floats.data();
  const int64_t far = N / STREAMS;
#pragma omp parallel for num_threads(n_threads) schedule(static) if (n_threads > 1)
  for (int64_t n = 0; n < far; ++n) columns<STREAMS>(x, w, bias, y, M, N, K, n, far);
  for (int64_t n = far * STREAMS; n < N; ++n) columns<1>(x, w, bias, y, M, N, K, n, 0);
}

bool has_decode_linear() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#else
}  // namespace

template <typename T>
void decode_linear(const T*, const T*, const T*, T*, int64_t, int64_t, int64_t, int) {
  throw std::runtime_error("not supported on this CPU");
}

bool has_decode_linear() { return false; }
#endif

template void decode_linear(const float*, const float*, const float*, float*, int64_t, int64_t,
                            int64_t, int);
template void decode_linear(const bfloat16*, const bfloat16*, const bfloat16*, bfloat16*, int64_t,
                            int64_t, int64_t, int);
