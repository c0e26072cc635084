// Elementary functions in float32 without branches or calls, so that a loop over them vectorises, and overloads for double
// for the scalar solver. Shared by host and device code.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define MOD_FUSED_INLINE static __host__ __device__ __forceinline__
#define MOD_FUSED_MEMBER __host__ __device__ __forceinline__
#else
// `static`: each instruction set's translation unit must keep its own copy.
#define MOD_FUSED_INLINE static inline __attribute__((always_inline))
#define MOD_FUSED_MEMBER inline __attribute__((always_inline))
#endif

namespace mod_fused {

MOD_FUSED_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

MOD_FUSED_INLINE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// An unsigned integer with the order of the floats; equal for -0 and +0.
MOD_FUSED_INLINE uint32_t ordered(float x) {
  const uint32_t bits = float_bits(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

MOD_FUSED_INLINE float unordered(uint32_t x) { return bits_float(x & 0x80000000u ? x & 0x7fffffffu : ~x); }

// max(x, bound) for a negative bound and min(x, bound) for a positive one, on the bits: compilers make one instruction of the
// integer comparison. NaN may become the bound.
MOD_FUSED_INLINE float not_below(float x, float negative_bound) {
  const uint32_t bits = float_bits(x), bound = float_bits(negative_bound);
  return bits_float(bits < bound ? bits : bound);
}
MOD_FUSED_INLINE float not_above(float x, float positive_bound) {
  const int32_t bits = (int32_t)float_bits(x), bound = (int32_t)float_bits(positive_bound);
  return bits_float((uint32_t)(bits < bound ? bits : bound));
}

// a * b + c with one rounding on every machine, so that every backend gets the same keys.
MOD_FUSED_INLINE float fused_multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return (float)((double)a * (double)b + (double)c);  // the product is exact in double
#endif
}

// a * b + c where the rounding does not matter.
MOD_FUSED_INLINE float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// 2^n for the integer n nearest to x, -126 <= x <= 128 (+inf for n = 128). Adding 1.5 * 2^23 + 127 rounds x and puts the biased
// exponent into the lowest bits.
struct PowerOfTwo {
  float n, value;
};

MOD_FUSED_INLINE PowerOfTwo nearest_power(float x) {
  const float magic = 12583039.0f;
  const float shifted = x + magic;
  return {shifted - magic, bits_float(float_bits(shifted) << 23)};
}

// e^x = scale * (1 + tail) with |tail| < 0.42; x in [-87, 88].
struct SplitExp {
  float scale, tail;
};

MOD_FUSED_INLINE SplitExp split_exp(float x) {
  const PowerOfTwo power = nearest_power(x * 1.44269504f);
  float r = multiply_add(power.n, -0.693145751953125f, x);
  r = multiply_add(power.n, -1.42860677e-6f, r);
  // Minimax on |r| <= log(2) / 2: relative error 3e-9.
  float p = 0.0013814540579915047f;
  p = multiply_add(p, r, 0.00836874544620514f);
  p = multiply_add(p, r, 0.04166838899254799f);
  p = multiply_add(p, r, 0.1666652113199234f);
  p = multiply_add(p, r, 0.4999999403953552f);
  return {power.value, multiply_add(r * r, p, r)};
}

// 2^x for -126 <= x <= 127; elsewhere a meaningless finite number or NaN. Relative error 1e-7.
MOD_FUSED_INLINE float exp2_near(float x) {
  const PowerOfTwo power = nearest_power(x);
  const float f = x - power.n;
  float p = 0.001326472731307149f;
  p = multiply_add(p, f, 0.009671512991189957f);
  p = multiply_add(p, f, 0.05550733581185341f);
  p = multiply_add(p, f, 0.24022242426872253f);
  p = multiply_add(p, f, 0.6931470036506653f);
  return multiply_add(p, f, 1.0f) * power.value;
}

// 2^x for x <= 127; about 2^-126 below -126, so that a sum needs no branch. NaN stays NaN. Relative error 1e-7.
MOD_FUSED_INLINE float exp2_of(float x) { return exp2_near(x < -126.0f ? -126.0f : x); }

// The same for any x: +inf from 128 on, so that a sum shows the overflow.
MOD_FUSED_INLINE float exp2_any(float x) { return exp2_of(x > 128.0f ? 128.0f : x); }

// 1 / x for 1e-37 < x < 1e38 without a division: a first guess from the bits, then Newton. Relative error 2e-7.
MOD_FUSED_INLINE float reciprocal(float x) {
  float r = bits_float(0x7ef311c7u - float_bits(x));
  r = r * multiply_add(-x, r, 2.0f);
  r = r * multiply_add(-x, r, 2.0f);
  return r * multiply_add(-x, r, 2.0f);
}

// e^x for x <= 88, for deficits: e^-87 below -87.
MOD_FUSED_INLINE float exp_near(float x) {
  const SplitExp e = split_exp(x < -87.0f ? -87.0f : x);
  return multiply_add(e.scale, e.tail, e.scale);
}
MOD_FUSED_INLINE double exp_near(double x) { return exp(x); }

// e^x; 0 below -87, +inf above 88.7; NaN stays NaN.
MOD_FUSED_INLINE float exp_of(float x) {
  const SplitExp e = split_exp(x > 88.8f ? 88.8f : x);
  const float y = multiply_add(e.scale, e.tail, e.scale);
  return x < -87.0f ? 0.0f : y;
}

// e^x - 1, relatively exact near 0; x >= -87, saturates above 85.
MOD_FUSED_INLINE float expm1_of(float x) {
  const SplitExp e = split_exp(x > 85.0f ? 85.0f : x);
  return multiply_add(e.scale, e.tail, e.scale - 1.0f);
}

// The same for 0 <= x <= 85.
MOD_FUSED_INLINE float expm1_near(float x) {
  const SplitExp e = split_exp(x);
  return multiply_add(e.scale, e.tail, e.scale - 1.0f);
}

// log x for normal positive x.
MOD_FUSED_INLINE float log_of(float x) {
  const uint32_t bits = float_bits(x);
  const int32_t exponent = (int32_t)(bits - 0x3f2aaaabu) >> 23;  // mantissa in [2/3, 4/3)
  const float f = bits_float(bits - ((uint32_t)exponent << 23)) - 1.0f;
  float p = 0.14026358723640442f;
  p = multiply_add(p, f, -0.1538853943347931f);
  p = multiply_add(p, f, 0.13995806872844696f);
  p = multiply_add(p, f, -0.1641596108675003f);
  p = multiply_add(p, f, 0.20011168718338013f);
  p = multiply_add(p, f, -0.2500782012939453f);
  p = multiply_add(p, f, 0.33333197236061096f);
  p = multiply_add(p, f, -0.49999937415122986f);
  const float n = (float)exponent;
  const float low = multiply_add(f * f, p, n * 1.42860677e-6f);
  return multiply_add(n, 0.693145751953125f, low + f);
}

// log(1 + x), relatively exact; NaN from -1 down.
MOD_FUSED_INLINE float log1p_of(float x) {
  const float rounded = 1.0f + x;
  const float result = log_of(rounded) + (x - (rounded - 1.0f)) / rounded;
  return rounded > 0.0f ? result : __builtin_nanf("");
}

// log(1 + x) for 0 <= x <= 1, relatively exact.
MOD_FUSED_INLINE float log1p_unit(float x) {
  float p = 0.005232692696154118f;
  p = multiply_add(p, x, -0.029505232349038124f);
  p = multiply_add(p, x, 0.07822594046592712f);
  p = multiply_add(p, x, -0.13663244247436523f);
  p = multiply_add(p, x, 0.19106006622314453f);
  p = multiply_add(p, x, -0.2484298199415207f);
  p = multiply_add(p, x, 0.3331909775733948f);
  p = multiply_add(p, x, -0.4999949336051941f);
  p = multiply_add(p, x, 0.9999999403953552f);
  return x * p;
}

MOD_FUSED_INLINE double exp_of(double x) { return exp(x); }
MOD_FUSED_INLINE double expm1_of(double x) { return expm1(x); }
MOD_FUSED_INLINE double log_of(double x) { return log(x); }
MOD_FUSED_INLINE double log1p_of(double x) { return log1p(x); }
MOD_FUSED_INLINE double log1p_unit(double x) { return log1p(x); }

}  // namespace mod_fused
