// The operations of gpt2/cpu.py that are in C++; see cpu_kernels.cpp and decode_linear.cpp.
#pragma once

#include <cstdint>

struct bfloat16 {
  uint16_t bits;
};

template <typename T>
void gelu(const T* x, T* y, int64_t n, int threads);

template <typename T>
void gelu_backward(const T* x, const T* dy, T* dx, int64_t n, int threads);

// z (rows, n) with n_classes <= n; targets (rows) below n_classes; losses (rows).
template <typename T>
void cross_entropy(T* z, const int64_t* targets, float* losses, int64_t rows, int64_t n_classes,
                   int64_t n, bool gradient, int threads);

// qkv, dqkv (B, T, 3, H, D) with D a multiple of 16; out, dout (B, T, H, D); lse (B, H, T).
// start (B, T): the first key that each query sees, never falling along T and at most its own; or
// nullptr: 0.
template <typename T>
void attention(const T* qkv, const int32_t* start, T* out, float* lse, int64_t B, int64_t length,
               int64_t H, int64_t D, int threads);

template <typename T>
void attention_backward(const T* qkv, const int32_t* start, const T* out, const T* dout,
                        const float* lse, T* dqkv, int64_t B, int64_t length, int64_t H, int64_t D,
                        int threads);

// y (M, N) = x (M, K) w (N, K)^T + bias (N) or nullptr, for a few rows; where has_decode_linear().
template <typename T>
void decode_linear(const T* x, const T* w, const T* bias, T* y, int64_t M, int64_t N, int64_t K,
                   int threads);
bool has_decode_linear();
