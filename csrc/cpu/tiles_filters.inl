// The part of tiles.inl for masks and filters: loops over keys.

// How many keys `above` tests, and may skip, at once.
constexpr int kLanes = 16;

float peak_of(const float* __restrict key, int n) {
  float peak = -kInfinity;
#pragma omp simd reduction(max : peak)
  for (int i = 0; i < n; ++i) peak = key[i] > peak ? key[i] : peak;
  return peak;
}

float least_of(const float* __restrict key, int n) {
  float least = kInfinity;
#pragma omp simd reduction(min : least)
  for (int i = 0; i < n; ++i) least = key[i] < least ? key[i] : least;
  return least;
}

void mask_bytes(const uint8_t* __restrict allowed, int n, float* __restrict key) {
#pragma omp simd
  for (int i = 0; i < n; ++i) key[i] = allowed[i] != 0 ? key[i] : -kInfinity;
}

void mask_bits(const int32_t* __restrict words, int n, float* __restrict key) {
  for (int begin = 0; begin < n; begin += 32) {
    const uint32_t word = (uint32_t)words[begin / 32];
    float* __restrict k = key + begin;
    if (begin + 32 <= n) {
#pragma omp simd
      for (int i = 0; i < 32; ++i) k[i] = word & (1u << i) ? k[i] : -kInfinity;
    } else {
      for (int i = 0; i < n - begin; ++i) k[i] = word & (1u << i) ? k[i] : -kInfinity;
    }
  }
}

float highest_bias(const float* __restrict key, const float* __restrict bias, int n) {
  float highest = -kInfinity;
  int broken = 0;
#pragma omp simd reduction(max : highest) reduction(| : broken)
  for (int i = 0; i < n; ++i) {
    const float x = key[i] > -kInfinity ? bias[i] : -kInfinity;
    highest = x > highest ? x : highest;
    broken |= bias[i] < kInfinity ? 0 : 1;
  }
  return broken ? NAN : highest;
}

void add_bias(const float* __restrict bias, int n, float level, float highest, float* __restrict key) {
#pragma omp simd
  for (int i = 0; i < n; ++i) key[i] = key[i] > -kInfinity ? (key[i] - level) + (bias[i] - highest) : -kInfinity;
}

// Members of a group are kGroups apart, so that the inner loop runs over neighbours.
int group_peaks(const float* __restrict key, int n, float* __restrict out) {
  const int groups = n < kGroups ? n : kGroups;
  for (int i = 0; i < groups; ++i) out[i] = key[i];
  for (int begin = kGroups; begin < n; begin += kGroups) {
    const int count = n - begin < kGroups ? n - begin : kGroups;
    const float* __restrict k = key + begin;
#pragma omp simd
    for (int i = 0; i < count; ++i) out[i] = k[i] > out[i] ? k[i] : out[i];
  }
  return groups;
}

int above(const float* __restrict key, int n, float least, float* __restrict out) {
  int count = 0, begin = 0;
  for (; begin + kLanes <= n; begin += kLanes) {
    const float* __restrict k = key + begin;
#if defined(__AVX512F__)
    // Compilers do not make this instruction from a plain loop.
    const __m512 x = _mm512_loadu_ps(k);
    const __mmask16 taken = _mm512_cmp_ps_mask(x, _mm512_set1_ps(least), _CMP_GE_OQ);
    _mm512_storeu_ps(out + count, _mm512_maskz_compress_ps(taken, x));
    count += __builtin_popcount(taken);
#else
    float peak = k[0];
#pragma omp simd reduction(max : peak)
    for (int i = 0; i < kLanes; ++i) peak = k[i] > peak ? k[i] : peak;
    if (!(peak >= least)) continue;
    for (int i = 0; i < kLanes; ++i) {
      out[count] = k[i];
      count += k[i] >= least;
    }
#endif
  }
  for (; begin < n; ++begin) {
    out[count] = key[begin];
    count += key[begin] >= least;
  }
  return count;
}

void buckets(const float* __restrict key, int n, uint32_t base, int shift, uint32_t* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = (ordered(key[i]) - base) >> shift;
}

int pick(const uint32_t* __restrict bucket, uint32_t wanted, int n, float* key) {
  int count = 0, i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const __m512 x = _mm512_loadu_ps(key + i);
    const __mmask16 taken = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(bucket + i), _mm512_set1_epi32((int)wanted));
    _mm512_storeu_ps(key + count, _mm512_maskz_compress_ps(taken, x));
    count += __builtin_popcount(taken);
  }
#endif
  for (; i < n; ++i) {
    key[count] = key[i];
    count += bucket[i] == wanted;
  }
  return count;
}

void spread(const float* __restrict key, int n, float least, float scale, uint32_t* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = (uint32_t)(int32_t)((key[i] - least) * scale);
}

int64_t fixed_mass(const float* __restrict key, int n, float least, float peak, float beta) {
  // Split into halves of 20 bits, so that the sums over a tile fit 32 bits.
  int32_t high = 0, low = 0;
#pragma omp simd reduction(+ : high, low)
  for (int i = 0; i < n; ++i) {
    const float mass = exp_of((key[i] - peak) * beta);
    const float scaled = key[i] >= least ? mass * 0x1p20f : 0.0f;
    const int32_t whole = (int32_t)scaled;
    high += whole;
    low += (int32_t)((scaled - (float)whole) * 0x1p20f);
  }
  return ((int64_t)high << 20) + low;
}

void fixed_masses(const float* __restrict key, int n, float peak, float beta, int64_t* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = (int64_t)(exp_of((key[i] - peak) * beta) * 0x1p40f);
}

float kept_masses(const float* __restrict key, int n, float peak, float beta, float least, float log_min_p,
                  float* __restrict out) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) {
    const float x = (key[i] - peak) * beta;
    const float mass = exp_of(x);
    out[i] = (key[i] >= least) & (x >= log_min_p) ? mass : 0.0f;
    sum += out[i];
  }
  return sum;
}

void normalised(const float* __restrict key, int n, double level, double log_norm, float* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = (float)(key[i] - level - log_norm);
}

constexpr FilterLoops kFilters = {peak_of, least_of, mask_bytes, mask_bits, highest_bias, add_bias,  group_peaks,
                                  above,   pick,     spread,     buckets,   fixed_mass,   fixed_masses, kept_masses};
