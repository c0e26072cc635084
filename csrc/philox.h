// Counter-based random numbers (docs/concepts.md): Philox-4x32-10, SplitMix64 and the race's exponential. Shared by host and
// device code. Loops over tokens that call them vectorise.
#pragma once

#include "scalar_math.h"

namespace mod_fused {

// First two output words of Philox-4x32-10 (Salmon et al., SC 2011).
MOD_FUSED_INLINE void philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1,
                             uint32_t* first, uint32_t* second) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  *first = c0;
  *second = c1;
}

MOD_FUSED_INLINE uint64_t split_mix(uint64_t state) {
  state += 0x9E3779B97F4A7C15ull;
  state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9ull;
  state = (state ^ (state >> 27)) * 0x94D049BB133111EBull;
  return state ^ (state >> 31);
}

// E = -log1p(-v), v = (x + 0.5) 2^-64 of the 64 bits x of two words; positive and finite.
MOD_FUSED_INLINE float exponential(uint32_t high, uint32_t low) {
  float v = (float)high * 0x1p-32f + ((float)low + 0.5f) * 0x1p-64f;
  v = v > 1.0f - 0x1p-24f ? 1.0f - 0x1p-24f : v;
  const float series = v * (1.0f + v * (0.5f + v * (1.0f / 3.0f)));
  // log(u) with u = 1 - v rounded, plus a correction for the rounding.
  const float u = 1.0f - v;
  const float lost = (1.0f - u) - v;
  const float direct = -(log_of(u) + lost / u);
  return v < 0x1p-12f ? series : direct;
}

}  // namespace mod_fused
