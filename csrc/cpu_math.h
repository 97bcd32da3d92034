// What the CPU's kernels have in common: levels of x86-64, float32 and bfloat16, and e^x.
#pragma once

#include "cpu_kernels.h"

#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_LEVELS 1
#define VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define HAS_LEVELS 0
#define VERSIONS
#endif

// Of a function whose vectors have a width of their own there is NAME_any, and on x86-64 besides one
// for each level, V3 NAME_v3 and V4 NAME_v4; BEST calls the processor's.
#if HAS_LEVELS
#define V3 __attribute__((target("arch=x86-64-v3")))
#define V4 __attribute__((target("arch=x86-64-v4")))
inline int level() {
  static const int found = __builtin_cpu_supports("x86-64-v4")   ? 4
                           : __builtin_cpu_supports("x86-64-v3") ? 3
                                                                 : 1;
  return found;
}
#define BEST(NAME, ...)                          \
  if (level() == 4) NAME##_v4(__VA_ARGS__);      \
  else if (level() == 3) NAME##_v3(__VA_ARGS__); \
  else NAME##_any(__VA_ARGS__);
#else
#define BEST(NAME, ...) NAME##_any(__VA_ARGS__);
#endif

#define INLINE inline __attribute__((always_inline))

INLINE float load(const float* p) { return *p; }
INLINE void store(float* p, float value) { *p = value; }

INLINE float load(const bfloat16* p) {
  const uint32_t bits = uint32_t(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds to the nearest, ties to even; what is not a number stays so.
INLINE void store(bfloat16* p, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  p->bits = uint16_t(value == value ? rounded : 0x7FC0);
}

// e^x within 2 units in the last place for x in [-87, 88]; below as at -87, from 89 on infinity.
// e^x = 2^n e^r with |r| <= log(2) / 2; the polynomial and log(2) in two parts are those of Cephes.
INLINE float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float n = std::nearbyint(x * 1.44269504088896341f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t power = uint32_t(int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &power, sizeof scale);
  return p * scale;
}
