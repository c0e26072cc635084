// What no implementation can be faster than, hand-vectorised: reading all the logits, and a divergence's own
// transcendentals on them. Built and called by floors.py. The work is split over threads as the op splits it.

#include "../../csrc/scalar_math.h"

namespace {

using namespace mod_fused;

constexpr int kPolicies = 2, kModels = kPolicies + 1;
constexpr int64_t kTile = 1024;  // ids a thread takes at a time
constexpr int kNewtonEvaluations = 4;  // Jeffrey has no form without iterations

enum class DivergenceId : int { reverse_kl, forward_kl, jsd, alpha, jeffrey };

struct BFloat16 {
  uint16_t bits;
};

MOD_FUSED_INLINE float widen(float x) { return x; }
MOD_FUSED_INLINE float widen(BFloat16 x) { return bits_float((uint32_t)x.bits << 16); }

// Sum of each result, so that none can be left out. `c` are constants that keep the arguments in range and apart.
template <DivergenceId divergence, class T>
float transcendentals(const T* const* models, const float* log_norms, const float* w, int64_t n) {
  const T *__restrict x0 = models[0], *__restrict x1 = models[1], *__restrict x2 = models[2];
  const float c0 = log_norms[0], c1 = log_norms[1], c2 = log_norms[2];
  const float w0 = w[0], w1 = w[1], w2 = w[2];
  const float c = w0 * c0 + w1 * c1 + w2 * c2;
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float l0 = widen(x0[i]), l1 = widen(x1[i]), l2 = widen(x2[i]);
    if (divergence == DivergenceId::reverse_kl) {
      sum += exp_of(multiply_add(w2, l2, multiply_add(w1, l1, multiply_add(w0, l0, -c))));
      continue;
    }
    // Three log-sum-exps, and pi_ref once they are known.
    float s = exp_of(l0 - c0) + exp_of(l1 - c1) + exp_of(l2 - c2) + exp_of(l0 - c0 - 1.0f);
    const float d1 = l1 - l0, d2 = l2 - l0;
    if (divergence == DivergenceId::forward_kl) s += w1 * exp_of(-d1) + w2 * exp_of(-d2);
    if (divergence == DivergenceId::alpha) s += w1 * exp_of(-0.5f * d1) + w2 * exp_of(-0.5f * d2);
    if (divergence == DivergenceId::jsd) {
      const float a1 = d1 < 0 ? d1 : -d1, a2 = d2 < 0 ? d2 : -d2;
      s += expm1_of(w1 * log1p_unit(exp_of(a1)) + w2 * log1p_unit(exp_of(a2)));
    }
    if (divergence == DivergenceId::jeffrey) {
      const float q = w1 * expm1_of(-d1) + w2 * expm1_of(-d2);
#pragma GCC unroll 4
      for (int k = 0; k < kNewtonEvaluations; ++k) {
        const float e = exp_of(q > 80.0f ? -80.0f : (float)k - q);
        s += log_of(e + 1.0f) + log_of(e + 2.0f) + log_of(e + 3.0f) + log_of(e + 4.0f);
      }
    }
    sum += s;
  }
  return sum;
}

template <DivergenceId divergence, class T>
float all_transcendentals(const void* const* tensors, const float* log_norms, const float* weights, int64_t rows,
                          int64_t vocab, int threads) {
  const int64_t tiles = (vocab + kTile - 1) / kTile;
  float sum = 0.0f;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : sum) if (threads > 1)
  for (int64_t task = 0; task < rows * tiles; ++task) {
    const int64_t row = task / tiles, begin = (task % tiles) * kTile;
    const T* models[kModels];
    for (int k = 0; k < kModels; ++k) models[k] = static_cast<const T*>(tensors[k]) + row * vocab + begin;
    const int64_t n = vocab - begin < kTile ? vocab - begin : kTile;
    sum += transcendentals<divergence>(models, log_norms + row * kModels, weights, n);
  }
  return sum;
}

template <class T>
float of_divergence(DivergenceId divergence, const void* const* tensors, const float* log_norms,
                    const float* weights, int64_t rows, int64_t vocab, int threads) {
  switch (divergence) {
    case DivergenceId::reverse_kl:
      return all_transcendentals<DivergenceId::reverse_kl, T>(tensors, log_norms, weights, rows, vocab, threads);
    case DivergenceId::forward_kl:
      return all_transcendentals<DivergenceId::forward_kl, T>(tensors, log_norms, weights, rows, vocab, threads);
    case DivergenceId::jsd:
      return all_transcendentals<DivergenceId::jsd, T>(tensors, log_norms, weights, rows, vocab, threads);
    case DivergenceId::alpha:
      return all_transcendentals<DivergenceId::alpha, T>(tensors, log_norms, weights, rows, vocab, threads);
    case DivergenceId::jeffrey:
      return all_transcendentals<DivergenceId::jeffrey, T>(tensors, log_norms, weights, rows, vocab, threads);
  }
  return 0.0f;
}

}  // namespace

// Sum of the raw 64-bit words of three tensors of `bytes` bytes each (a multiple of 8).
extern "C" uint64_t floor_read(const void* const* tensors, int64_t bytes, int threads) {
  constexpr int64_t kBlock = 512;  // words
  const int64_t words = bytes / 8, blocks = (words + kBlock - 1) / kBlock;
  uint64_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : sum) if (threads > 1)
  for (int64_t block = 0; block < kModels * blocks; ++block) {
    const int64_t begin = (block % blocks) * kBlock;
    const uint64_t* __restrict x = static_cast<const uint64_t*>(tensors[block / blocks]) + begin;
    const int64_t n = words - begin < kBlock ? words - begin : kBlock;
    uint64_t part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t i = 0; i < n; ++i) part += x[i];
    sum += part;
  }
  return sum;
}

// The transcendentals of one divergence on three [rows, vocab] tensors; log_norms [rows][3], weights [3] with the
// reference's coefficient first.
extern "C" float floor_math(int divergence, int bfloat16, const void* const* tensors, const float* log_norms,
                            const float* weights, int64_t rows, int64_t vocab, int threads) {
  const auto id = static_cast<DivergenceId>(divergence);
  if (bfloat16) return of_divergence<BFloat16>(id, tensors, log_norms, weights, rows, vocab, threads);
  return of_divergence<float>(id, tensors, log_norms, weights, rows, vocab, threads);
}
