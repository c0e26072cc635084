// The loops of tiles.h, compiled once per instruction set. The including file defines MOD_FUSED_LOOPS (a function name) and
// MOD_FUSED_LOOPS_NAME. Only that function may have external linkage: of an inline function shared between files the linker
// could keep the version of the widest instruction set, which crashes on older machines.

#include <math.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../divergence.h"
#include "../philox.h"
#include "tiles.h"

namespace mod_fused {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504f;
constexpr float kSmallestLogRef = -80.0f;  // a token with a smaller log pi_ref leaves the support

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

MOD_FUSED_INLINE float widen(float x) { return x; }
MOD_FUSED_INLINE float widen(BFloat16 x) { return bits_float((uint32_t)x.bits << 16); }
MOD_FUSED_INLINE float widen(Float16 x) {
  // Move exponent and mantissa into place, then multiply by 2^112 for the difference in bias. That is right for subnormals too.
  const uint32_t magnitude = (uint32_t)(x.bits & 0x7fffu) << 13;
  const float scaled = bits_float(magnitude) * 0x1p112f;
  const uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return bits_float(float_bits(scaled) | special | ((uint32_t)(x.bits & 0x8000u) << 16));
}

template <class T> MOD_FUSED_INLINE const T* at(const Source& x, int64_t begin) {
  return static_cast<const T*>(x.data) + begin;
}

template <class T> void load_as(const Source& x, int64_t begin, int n, float* __restrict out) {
  const T* __restrict from = at<T>(x, begin);
  const float scale = x.scale;
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = widen(from[i]) * scale;
}

void load(const Source& x, int64_t begin, int n, float* out) {
  if (x.dtype == DType::bfloat16) return load_as<BFloat16>(x, begin, n, out);
  if (x.dtype == DType::float16) return load_as<Float16>(x, begin, n, out);
  load_as<float>(x, begin, n, out);
}

template <class T> PeakSum peak_sum_of(const T* __restrict x, int n) {
  float peak = -kInfinity;
#pragma omp simd reduction(max : peak)
  for (int i = 0; i < n; ++i) {
    const float y = widen(x[i]);
    peak = y > peak ? y : peak;
  }
  const float from_peak = peak == -kInfinity ? 0.0f : peak;
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += exp_of(widen(x[i]) - from_peak);
  return {peak, sum};
}

PeakSum peak_sum(const Source& x, int64_t begin, int n) {
  if (x.scale != 1.0f) {
    // Scale first: in a fused multiply-subtract the rounding of the peak would remain.
    alignas(64) float scaled[kTile];
    load(x, begin, n, scaled);
    return peak_sum_of(scaled, n);
  }
  if (x.dtype == DType::bfloat16) return peak_sum_of(at<BFloat16>(x, begin), n);
  if (x.dtype == DType::float16) return peak_sum_of(at<Float16>(x, begin), n);
  return peak_sum_of(at<float>(x, begin), n);
}

template <class T> float sum_from_as(const Source& x, int64_t begin, int n, float from) {
  const T* __restrict data = at<T>(x, begin);
  const float factor = x.scale * kLog2E, offset = -from * kLog2E;
  float sum = 0.0f, least = kInfinity, most = -kInfinity;
#pragma omp simd reduction(min : least) reduction(max : most) reduction(+ : sum)
  for (int i = 0; i < n; ++i) {
    const float y = multiply_add(widen(data[i]), factor, offset);
    least = y < least ? y : least;
    most = y > most ? y : most;
    sum += exp2_near(y);
  }
  if (least >= -126.0f && most <= 127.0f) return sum;
  // Again with exp2_any, which handles any range and takes half as long again.
  sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += exp2_any(multiply_add(widen(data[i]), factor, offset));
  return sum;
}

float sum_from(const Source& x, int64_t begin, int n, float from) {
  if (x.dtype == DType::bfloat16) return sum_from_as<BFloat16>(x, begin, n, from);
  if (x.dtype == DType::float16) return sum_from_as<Float16>(x, begin, n, from);
  return sum_from_as<float>(x, begin, n, from);
}

// The peak of a tile's keys, and whether all of them are finite.
struct KeyCheck {
  float peak;
  bool finite;
};

KeyCheck check_key(const float* __restrict key, int n) {
  float peak = -kInfinity, zero = 0.0f;
#pragma omp simd reduction(max : peak) reduction(+ : zero)
  for (int i = 0; i < n; ++i) {
    peak = key[i] > peak ? key[i] : peak;
    zero += key[i] - key[i];  // NaN if a key is not finite
  }
  return {peak, zero == 0.0f};
}

// The usual case in one loop: `count` tensors of one dtype, unscaled.
template <class T, int count> struct FusedKey {
  const T* x[count];
  float c[count];

  FusedKey(const Term* terms, int64_t begin) {
    for (int k = 0; k < count; ++k) {
      x[k] = at<T>(terms[k].source, begin);
      c[k] = terms[k].weight;
    }
  }
  MOD_FUSED_MEMBER float operator[](int i) const {
    float s = 0.0f;
#pragma GCC unroll 8
    for (int k = 0; k < count; ++k) s = fused_multiply_add(c[k], widen(x[k][i]), s);
    return s;
  }
};

template <class T, int count>
KeyCheck fused_key(const Term* terms, int64_t begin, int n, float* __restrict key) {
  const FusedKey<T, count> sum(terms, begin);
  float peak = -kInfinity, zero = 0.0f;
#pragma omp simd reduction(max : peak) reduction(+ : zero)
  for (int i = 0; i < n; ++i) {
    const float s = sum[i];
    key[i] = s;
    peak = s > peak ? s : peak;
    zero += s - s;
  }
  return {peak, zero == 0.0f};
}

template <class T, int count> KeySum fused_key_sum(const Term* terms, int64_t begin, int n, float from) {
  const FusedKey<T, count> key(terms, begin);
  const float offset = -from * kLog2E;
  float least = kInfinity, sum = 0.0f;
#pragma omp simd reduction(min : least) reduction(+ : sum)
  for (int i = 0; i < n; ++i) {
    const float s = key[i];
    least = s < least ? s : least;
    sum += exp2_any(multiply_add(s, kLog2E, offset));
  }
  return {sum, least};
}

bool fusable(const Term* terms, int count) {
  if (count < 1 || count > 4) return false;
  for (int k = 0; k < count; ++k)
    if (terms[k].source.scale != 1.0f || terms[k].source.dtype != terms[0].source.dtype) return false;
  return true;
}

template <class T> KeyCheck fused_key_of(const Term* terms, int count, int64_t begin, int n, float* key) {
  if (count == 1) return fused_key<T, 1>(terms, begin, n, key);
  if (count == 2) return fused_key<T, 2>(terms, begin, n, key);
  if (count == 3) return fused_key<T, 3>(terms, begin, n, key);
  return fused_key<T, 4>(terms, begin, n, key);
}

template <class T> KeySum fused_key_sum_of(const Term* terms, int count, int64_t begin, int n, float from) {
  if (count == 1) return fused_key_sum<T, 1>(terms, begin, n, from);
  if (count == 2) return fused_key_sum<T, 2>(terms, begin, n, from);
  if (count == 3) return fused_key_sum<T, 3>(terms, begin, n, from);
  return fused_key_sum<T, 4>(terms, begin, n, from);
}

TileMix log_linear(const Term* terms, int count, int64_t begin, int n, float* __restrict key) {
  KeyCheck check;
  alignas(64) float buffer[kTile];
  if (fusable(terms, count)) {
    const DType dtype = terms[0].source.dtype;
    check = dtype == DType::bfloat16  ? fused_key_of<BFloat16>(terms, count, begin, n, key)
            : dtype == DType::float16 ? fused_key_of<Float16>(terms, count, begin, n, key)
                                      : fused_key_of<float>(terms, count, begin, n, key);
  } else {
    for (int i = 0; i < n; ++i) key[i] = 0.0f;
    for (int k = 0; k < count; ++k) {
      load(terms[k].source, begin, n, buffer);
      const float c = terms[k].weight;
#pragma omp simd
      for (int i = 0; i < n; ++i) key[i] = fused_multiply_add(c, buffer[i], key[i]);
    }
    check = check_key(key, n);
  }
  if (check.finite) return {check.peak, false};

  // A key is not finite: again, looking at each token's logits.
  alignas(64) float excluded[kTile];
  int broken = 0;
  for (int i = 0; i < n; ++i) key[i] = excluded[i] = 0.0f;
  for (int k = 0; k < count; ++k) {
    load(terms[k].source, begin, n, buffer);
    const float c = terms[k].weight;
#pragma omp simd reduction(| : broken)
    for (int i = 0; i < n; ++i) {
      const float x = buffer[i];
      const bool finite = fabsf(x) < kInfinity;
      broken |= !(x < kInfinity);
      excluded[i] = finite ? excluded[i] : 1.0f;
      key[i] = fused_multiply_add(c, finite ? x : 0.0f, key[i]);
    }
  }
  float peak = -kInfinity;
#pragma omp simd reduction(max : peak) reduction(| : broken)
  for (int i = 0; i < n; ++i) {
    broken |= excluded[i] == 0.0f && !(key[i] < kInfinity);  // the sum overflowed to +inf; -inf is allowed
    key[i] = excluded[i] == 0.0f ? key[i] : -kInfinity;
    peak = key[i] > peak ? key[i] : peak;
  }
  return {peak, broken != 0};
}

KeySum log_linear_sum(const Term* terms, int count, int64_t begin, int n, float from) {
  if (fusable(terms, count)) {
    const DType dtype = terms[0].source.dtype;
    return dtype == DType::bfloat16  ? fused_key_sum_of<BFloat16>(terms, count, begin, n, from)
           : dtype == DType::float16 ? fused_key_sum_of<Float16>(terms, count, begin, n, from)
                                     : fused_key_sum_of<float>(terms, count, begin, n, from);
  }
  alignas(64) float key[kTile];
  const TileMix mix = log_linear(terms, count, begin, n, key);
  if (mix.broken) return {kInfinity, -kInfinity};
  const Source keys = {key, DType::float32, 1.0f};
  float least = kInfinity;
#pragma omp simd reduction(min : least)
  for (int i = 0; i < n; ++i) least = key[i] < least ? key[i] : least;
  return {sum_from(keys, 0, n, from), least};
}

float sum_exp(const float* __restrict key, int n, float peak, float beta) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) sum += exp2_any((key[i] - peak) * (beta * kLog2E));
  return sum;
}

void exps(const float* __restrict key, int n, float peak, float beta, float* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = exp_of((key[i] - peak) * beta);
}

bool add_tilt(const float* __restrict values, int n, float v, double* __restrict tilt) {
  int broken = 0;
#pragma omp simd reduction(| : broken)
  for (int i = 0; i < n; ++i) {
    broken |= !(values[i] < kInfinity);
    const double sum = tilt[i] - (double)v * (double)values[i];
    tilt[i] = values[i] > -kInfinity ? sum : (double)kInfinity;
  }
  return broken != 0;
}

DeficitSums close_deficit(const float* __restrict ref, const double* __restrict tilt, int n, float log_norm,
                          float* __restrict p, float* __restrict q) {
  double least = kExcluded;
  float mass = 0.0f, first = 0.0f;
#pragma omp simd reduction(min : least) reduction(+ : mass, first)
  for (int i = 0; i < n; ++i) {
    const float lr = ref[i] - log_norm;
    const double sum = tilt == nullptr ? (double)q[i] : q[i] + tilt[i];
    const bool inside = (lr >= kSmallestLogRef) & (q[i] < kExcluded) & (sum < (double)kExcluded);
    p[i] = inside ? exp_of(lr) : 0.0f;
    q[i] = inside ? q[i] : kExcluded;
    const double counted = inside ? sum : (double)kExcluded;
    least = counted < least ? counted : least;
    mass += p[i];
    first += p[i] * (float)counted;
  }
  return {least, mass, first, 0.0, 0.0};
}

RaceResult race(const float* __restrict mass, int n, uint64_t seed, uint64_t position, uint32_t index,
                uint32_t stream) {
  alignas(64) float quotient[kTile];
  const uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  const uint32_t c0 = (uint32_t)position, c1 = (uint32_t)(position >> 32);
  float least = kInfinity;
#pragma omp simd reduction(min : least)
  for (int i = 0; i < n; ++i) {
    uint32_t high, low;
    philox(c0, c1, index + (uint32_t)i, stream, k0, k1, &high, &low);
    // A mass of 0 never wins, also where the other quotients overflow.
    float q = exponential(high, low) / mass[i];
    q = q < 3.4028235e38f ? q : 3.4028235e38f;
    quotient[i] = mass[i] > 0.0f ? q : kInfinity;
    least = quotient[i] < least ? quotient[i] : least;
  }
  if (least == kInfinity) return {-1, least};
  int winner = 0;
  while (quotient[winner] != least) ++winner;
  return {winner, least};
}

#include "tiles_filters.inl"
#include "tiles_divergences.inl"

template <class... D> constexpr TileLoops table_of(DivergenceList<D...>) {
  return {
      MOD_FUSED_LOOPS_NAME,
      load,
      peak_sum,
      log_linear,
      log_linear_sum,
      sum_from,
      sum_exp,
      exps,
      add_tilt,
      close_deficit,
      race,
      normalised,
      kFilters,
      {Loops<D>::table()...},
  };
}

constexpr TileLoops kLoops = table_of(LoopDivergences());

}  // namespace

const TileLoops* MOD_FUSED_LOOPS() { return &kLoops; }

}  // namespace mod_fused
