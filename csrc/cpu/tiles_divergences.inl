// The divergences' loops; included by tiles.inl in its namespace.

constexpr float kSmallestExponent = -115.0f;  // inside -80 * log2(e)

// The loops of one divergence, which is made from its parameter alone.
template <class D> struct Loops {
  static constexpr bool kOfMass = DivergencesOfMass::place<D>() >= 0;
  static constexpr bool symmetric = !D::clamped;  // Jensen-Shannon: the term looks at -|y|

  // H up to e^constant and -H'/H / order.
  static MOD_FUSED_MEMBER void ratio(const D& divergence, float y, float* h, float* fall) {
    if constexpr (D::stieltjes) {
      *fall = reciprocal(y);
      *h = divergence.power(y, *fall);
    } else {
      divergence.ratio(y, h, fall);
    }
  }

  // With `careful` the result is right for any input. Without it, only if all exponents are in range, as `in_range` then
  // says; NaN and infinities show in `in_range` or in the sums.
  template <class T, int count, bool careful>
  static DeficitSums deficits_of(const DeficitTile& tile, int n, float parameter, float* __restrict p, float* __restrict u,
                                 bool* in_range) {
    const D divergence(parameter);
    const T* __restrict ref = static_cast<const T*>(tile.ref);
    const T* policies[count];
    float offsets[count], weights[count];
    for (int k = 0; k < count; ++k) {
      policies[k] = static_cast<const T*>(tile.policies[k]);
      offsets[k] = tile.offsets[k];
      weights[k] = tile.weights[k];
    }
    const float factor = tile.factor, limit = tile.limit, log_norm = tile.log_norm, offset = tile.log_norm_offset;
    float least = kExcluded, mass = 0.0f, first = 0.0f, s1 = 0.0f, s2 = 0.0f;
    float lowest = kInfinity, highest = -kInfinity;
#pragma omp simd reduction(min : least, lowest) reduction(max : highest) reduction(+ : mass, first, s1, s2)
    for (int i = 0; i < n; ++i) {
      const float r = widen(ref[i]);
      float z = multiply_add(r, kLog2E, offset);
      lowest = z < lowest ? z : lowest;
      float q = 0.0f, least_logit = 0.0f;
#pragma GCC unroll 3
      for (int k = 0; k < count; ++k) {
        const float x = widen(policies[k][i]);
        // Subtract the raw logits first: that is exact for 16-bit logits.
        float y = multiply_add(x - r, factor, offsets[k]);
        const float size = symmetric ? fabsf(y) : y;
        highest = size > highest ? size : highest;
        if (careful) {
          least_logit = x < least_logit ? x : least_logit;
          if (symmetric) {
            // Below -120 the term is linear to the last bit.
            const float near = y > 120.0f ? 120.0f : y < -120.0f ? -120.0f : y;
            q = multiply_add(weights[k], divergence.term(near) + (y < -120.0f ? (-120.0f - y) * 0.693147181f : 0.0f), q);
            continue;
          }
          if (D::linear) q = multiply_add(weights[k], y < -126.0f ? (y + 126.0f) * 0.693147181f : 0.0f, q);
          y = y > limit ? limit : y < -126.0f ? -126.0f : y;
        }
        q = multiply_add(weights[k], divergence.term(y), q);
      }
      float mass_here, u_here;
      if (careful) {
        const bool inside = (r - log_norm >= kSmallestLogRef) & (least_logit > -kInfinity) & (q < kExcluded);
        mass_here = inside ? exp2_of(z) : 0.0f;
        q = inside ? q : kExcluded;
        const float closed = symmetric ? divergence.excess(q < -80.0f ? -80.0f : q) : q;
        u_here = inside ? closed : kExcluded;
      } else {
        mass_here = exp2_near(z);
        u_here = divergence.close(q);
      }
      float h, fall;
      ratio(divergence, u_here, &h, &fall);
      p[i] = mass_here;
      u[i] = u_here;
      least = u_here < least ? u_here : least;
      mass += mass_here;
      first = multiply_add(mass_here, q, first);
      const float g = mass_here * h;
      s1 += g;
      s2 = multiply_add(g, fall, s2);
    }
    *in_range = (lowest >= kSmallestExponent) & (highest <= limit) & (fabsf(first) < kInfinity);
    return {least, mass, first, s1, s2};
  }

  template <class T, int count>
  static DeficitSums deficits_checked(const DeficitTile& tile, int n, float parameter, float* p, float* u) {
    bool in_range = false;
    if (!tile.careful) {
      const DeficitSums sums = deficits_of<T, count, false>(tile, n, parameter, p, u, &in_range);
      if (in_range) return sums;
    }
    return deficits_of<T, count, true>(tile, n, parameter, p, u, &in_range);
  }

  template <class T>
  static DeficitSums deficits_as(const DeficitTile& tile, int n, float parameter, float* p, float* u) {
    if (tile.count == 1) return deficits_checked<T, 1>(tile, n, parameter, p, u);
    if (tile.count == 2) return deficits_checked<T, 2>(tile, n, parameter, p, u);
    return deficits_checked<T, 3>(tile, n, parameter, p, u);
  }

  static DeficitSums deficits(const DeficitTile& tile, int n, float parameter, float* p, float* u) {
    if (tile.dtype == DType::bfloat16) return deficits_as<BFloat16>(tile, n, parameter, p, u);
    if (tile.dtype == DType::float16) return deficits_as<Float16>(tile, n, parameter, p, u);
    return deficits_as<float>(tile, n, parameter, p, u);
  }

  static void add_deficit(const float* __restrict ref, const float* __restrict policy, int n, float parameter, float shift,
                          float floor, float w, float* __restrict q) {
    const D divergence(parameter);
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      // Subtract the raw logits first: that is exact for 16-bit logits.
      float d = (policy[i] - ref[i]) + shift;
      if (D::clamped) d = d < floor ? floor : d;
      float deficit;
      if constexpr (kOfMass) deficit = divergence.of_policy(d);
      else deficit = divergence.deficit(d);
      const float sum = q[i] + w * deficit;
      q[i] = policy[i] > -kInfinity ? sum : __builtin_nanf("");
    }
  }

  static void excesses(float* __restrict q, const double* __restrict tilt, int n, float parameter, double least) {
    const D divergence(parameter);
    if (tilt != nullptr)
      for (int i = 0; i < n; ++i) q[i] = (float)(q[i] + tilt[i] - least);
    const float from = tilt == nullptr ? (float)least : 0.0f;
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const float d = q[i] - from;
      // A tilt may move the Q of a token off the support below the least Q.
      q[i] = divergence.excess(d < kExcluded ? (d > 0.0f ? d : 0.0f) : kExcluded);
    }
  }

  static MassSums sums(const float* __restrict p, const float* __restrict u, int n, float parameter, float base, float t) {
    const D divergence(parameter);
    float s1 = 0.0f, s2 = 0.0f;
#pragma omp simd reduction(+ : s1, s2)
    for (int i = 0; i < n; ++i) {
      float h, fall;
      ratio(divergence, (u[i] - base) + t, &h, &fall);
      const float g = p[i] * h;
      s1 += g;
      s2 = multiply_add(g, fall, s2);
    }
    return {s1, s2};
  }

  static void masses(const float* __restrict p, const float* __restrict u, int n, float parameter, float base, float t,
                     float* __restrict out) {
    const D divergence(parameter);
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      float h, fall;
      ratio(divergence, (u[i] - base) + t, &h, &fall);
      out[i] = p[i] * h;
    }
  }

  static void keys(const float* __restrict p, const float* __restrict u, int n, float parameter, float base, float t,
                   float constant, float* __restrict out) {
    const D divergence(parameter);
    float most = 0.0f;
#pragma omp simd reduction(max : most)
    for (int i = 0; i < n; ++i) {
      const float y = (u[i] - base) + t, inside = p[i] > 0.0f ? y : 0.0f;
      const float key = log_of(p[i] > 0.0f ? p[i] : 1.0f) + (constant + divergence.log_power(y));
      most = inside > most ? inside : most;
      out[i] = p[i] > 0.0f ? key : -kInfinity;
    }
    if constexpr (symmetric) {
      if (!(most > D::kFar)) return;
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        const float y = (u[i] - base) + t, key = log_of(p[i] > 0.0f ? p[i] : 1.0f) + (constant + divergence.log_power_far(y));
        out[i] = (p[i] > 0.0f) & (y > D::kFar) ? key : out[i];
      }
    }
  }

  static constexpr DivergenceLoops table() {
    if constexpr (kOfMass) return {nullptr, add_deficit, excesses, sums, masses, keys};
    else return {deficits, add_deficit, excesses, sums, masses, keys};
  }
};
