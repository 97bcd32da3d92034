// The operations of gpt2/cpu.py that are in C++; each file says what it has.
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

// One token for each of B rows: all of GPT-2 after the embedding x (B, C), which it overwrites;
// logits (B, n_classes). weights: for each block ln_1, c_attn, c_proj, ln_2, c_fc, c_proj, and then
// ln_f and the head, the addresses of weight and bias (or nullptr) of each; T are the matrices and
// their biases, the norms are float. cache (n_layer, 2, B, H, capacity, D) has length tokens and gets
// this one; start (B): the first that a row sees, or nullptr: 0.
template <typename T>
void decode(const void* const* weights, float* x, float* cache, const int32_t* start, float* logits,
            int64_t n_layer, int64_t B, int64_t H, int64_t C, int64_t capacity, int64_t length,
            int64_t n_classes, int threads);
