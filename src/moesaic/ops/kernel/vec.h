// Vectors of the widest kind the compiler was asked for: LANES floats. One source serves AVX-512, AVX2, NEON and anything else
// GCC or Clang know, because arithmetic is written on vector types and only three things need an instruction by name.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif
#if LANES == 16 && defined(__AVX512BF16__)
#define HAVE_DOT 1  // a bf16 pair times a bf16 pair, added to fp32
#else
#define HAVE_DOT 0
#endif

typedef uint16_t bf16;
typedef float vf __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * LANES), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * LANES), may_alias));
typedef bf16 vh __attribute__((vector_size(2 * LANES), may_alias));
typedef float vf_u __attribute__((vector_size(4 * LANES), may_alias, aligned(4)));
typedef uint32_t vu_u __attribute__((vector_size(4 * LANES), may_alias, aligned(2)));
typedef bf16 vh_u __attribute__((vector_size(2 * LANES), may_alias, aligned(2)));
#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float *p) { return *(const vf_u *)p; }
INLINE void store(float *p, vf v) { *(vf_u *)p = v; }
INLINE vf splat(float x) { return x - (vf){0}; }  // "x - 0" and not "x + 0": keeps -0
INLINE vf choose(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

// ---- bf16 -----------------------------------------------------------------------------------------------------------------

INLINE vu widen(vh v) {
#if LANES == 16
  return (vu)_mm512_cvtepu16_epi32((__m256i)v);  // GCC makes two halves of the general form
#else
  return __builtin_convertvector(v, vu);
#endif
}
INLINE vf from_bf16(const bf16 *p) { return (vf)(widen(*(const vh_u *)p) << 16); }
INLINE float from_bf16_1(bf16 x) {
  uint32_t u = (uint32_t)x << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
// Rounded to nearest, ties to even, in the high half of each word; NaN stays NaN.
INLINE vu round_bf16(vf x) {
  vu u = (vu)x;
  vu r = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
  vi nan = x != x;
  return (r & ~(vu)nan) | ((u | 0x00400000u) & 0xffff0000u & (vu)nan);
}
INLINE bf16 to_bf16_1(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if (x != x) return (bf16)((u >> 16) | 0x40);
  return (bf16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
INLINE void store_bf16(bf16 *p, vf x) {
#if HAVE_DOT
  *(vh_u *)p = (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  *(vh_u *)p = __builtin_convertvector(round_bf16(x) >> 16, vh);
#endif
}

// ---- either format ("type" is a constant at every call) -------------------------------------------------------------------

enum { F32, BF16 };
INLINE long size_of(int type) { return type == F32 ? 4 : 2; }
INLINE vf load_as(int type, const void *p, long i) { return type == F32 ? load((const float *)p + i) : from_bf16((const bf16 *)p + i); }
INLINE float load_as_1(int type, const void *p, long i) {
  return type == F32 ? ((const float *)p)[i] : from_bf16_1(((const bf16 *)p)[i]);
}
INLINE void store_as(int type, void *p, long i, vf x) {
  if (type == F32) store((float *)p + i, x);
  else store_bf16((bf16 *)p + i, x);
}
INLINE void store_as_1(int type, void *p, long i, float x) {
  if (type == F32) ((float *)p)[i] = x;
  else ((bf16 *)p)[i] = to_bf16_1(x);
}

// ---- activations ----------------------------------------------------------------------------------------------------------

// e^x to about 1 unit in the last place (Cephes: reduce by ln 2 in two parts, polynomial of degree 6, scale by the exponent).
INLINE vf vexp(vf x) {
  vf lo = splat(-87.3f), hi = splat(88.3f);
  x = choose(x < lo, lo, x);
  x = choose(x > hi, hi, x);
  vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  vf n = (x * 1.44269504f + magic);
  vi e = (vi)n - (vi)magic;
  n = n - magic;
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (vf)((vi)p + (e << 23));
}
INLINE vf inverse(vf x) {
#if LANES == 16
  vf r = (vf)_mm512_rcp14_ps((__m512)x);  // 14 bits, and a Newton step to 28: a third of a division's time
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}
INLINE vf sigmoid(vf x) { return inverse(1.0f + vexp(-x)); }
INLINE vf vtanh(vf x) { return 1.0f - 2.0f * inverse(1.0f + vexp(2.0f * x)); }
INLINE vf verf(vf x) {  // Abramowitz and Stegun 7.1.26: absolute error below 1.5e-7
  vi sign = (vi)x & (int32_t)0x80000000;
  vf a = (vf)((vi)x & 0x7fffffff);
  vf t = inverse(1.0f + 0.3275911f * a);
  vf p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  vf y = 1.0f - p * vexp(-a * a);
  return (vf)((vi)y | sign);
}

enum { SILU, GELU, GELU_TANH, RELU, SQUARED_RELU };
INLINE vf activate(int act, vf x) {
  vf zero = {0};
  switch (act) {
    case SILU: return x * sigmoid(x);
    case GELU: return 0.5f * x * (1.0f + verf(x * 0.70710678f));
    case GELU_TANH: return 0.5f * x * (1.0f + vtanh(0.79788456f * (x + 0.044715f * x * x * x)));
    case RELU: return choose(x < zero, zero, x);
    default: x = choose(x < zero, zero, x); return x * x;
  }
}
// The activation and its derivative.
INLINE vf activate_both(int act, vf x, vf *slope) {
  vf zero = {0};
  switch (act) {
    case SILU: {
      vf s = sigmoid(x);
      *slope = s * (1.0f + x * (1.0f - s));
      return x * s;
    }
    case GELU: {
      vf phi = 0.5f * (1.0f + verf(x * 0.70710678f));
      *slope = phi + x * 0.39894228f * vexp(-0.5f * x * x);
      return x * phi;
    }
    case GELU_TANH: {
      vf t = vtanh(0.79788456f * (x + 0.044715f * x * x * x));
      *slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456f * (1.0f + 3.0f * 0.044715f * x * x);
      return 0.5f * x * (1.0f + t);
    }
    case RELU: {
      vf y = choose(x < zero, zero, x);
      *slope = choose(x > zero, splat(1.0f), zero);
      return y;
    }
    default: {
      vf y = choose(x < zero, zero, x);
      *slope = 2.0f * y;
      return y * y;
    }
  }
}
