// The f-divergences: their three functions, as in mod_fused/divergence.py, and the form in which their
// inverse is summed over a vocabulary. docs/concepts.md explains deficit, tau and Q. Shared by host and
// device code; Real is float (vectorisable) or double.
//
//   deficit(d)    q = sup f' - f'(e^d)
//   log_ratio(q)  log H(q), H the inverse of q in ratio space
//   log_slope(q)  log(-H'(q))
//
// The loops store u(s). It gives H(tau + Q - min Q) as e^constant(tau) power(y) with
//
//   y = distance(base, t, u) = (u - base) + t,     base = u at min Q,     t = shift(tau).
//
// u is `close(sum of w * term(y))`, where here y = factor * log2(e) * d. The flags of a divergence:
//
//   bounded    sup f' is finite, and H has a pole there
//   clamped    log-ratios have a floor
//   stieltjes  power(y) = y^(-order). A sum over tokens then takes one reciprocal per token where order is 1 or 2, and no
//              logarithm. Without this flag `ratio` gives H
//   linear     f' continues linearly beyond the range of `term`
//
// A new divergence is a struct here and an entry of the list at the end.
#pragma once

#include "scalar_math.h"

namespace mod_fused {

// A divergence whose u is Q itself, and t is tau.
struct StoresDeficit {
  MOD_FUSED_MEMBER float close(float q) const { return q; }
  MOD_FUSED_MEMBER float excess(float d) const { return d; }
  double least_deficit(double u) const { return u; }
  double mean_deficit(double q) const { return q; }
  void measure_from(double) {}
  double shift(double tau) const { return tau; }
  double unshift(double t) const { return t; }
  double constant(double) const { return 0.0; }
  double order() const { return 1.0; }
};

struct ForwardKL : StoresDeficit {
  static constexpr int number = 1;
  static constexpr bool bounded = true, clamped = true, stieltjes = true, linear = false;
  explicit ForwardKL(double) {}
  static bool takes(double) { return true; }
  double supremum() const { return 0.0; }

  template <class Real> MOD_FUSED_MEMBER Real deficit(Real d) const { return exp_near(-d); }
  template <class Real> MOD_FUSED_MEMBER Real log_ratio(Real q) const { return -log_of(q); }
  template <class Real> MOD_FUSED_MEMBER Real log_slope(Real q) const { return -2 * log_of(q); }

  double factor() const { return -1.0; }
  MOD_FUSED_MEMBER float term(float y) const { return exp2_near(y); }
  MOD_FUSED_MEMBER float power(float, float r) const { return r; }
  MOD_FUSED_MEMBER float log_power(float y) const { return -log_of(y); }
  double pole(double y) const { return y; }
};

struct JensenShannon {
  static constexpr int number = 2;
  static constexpr bool bounded = true, clamped = false, stieltjes = true, linear = false;
  explicit JensenShannon(double) {}
  static bool takes(double) { return true; }
  double supremum() const { return 0.6931471805599453; }

  // softplus(-d), for any finite d.
  template <class Real> MOD_FUSED_MEMBER Real deficit(Real d) const {
    const Real a = d < 0 ? d : -d;  // -|d|
    return (d < 0 ? -d : Real(0)) + log1p_unit(exp_near(a));
  }
  template <class Real> MOD_FUSED_MEMBER Real log_ratio(Real q) const {
    return -(q + log_of(one_minus_exp(q)));
  }
  template <class Real> MOD_FUSED_MEMBER Real log_slope(Real q) const {
    return -q - 2 * log_of(one_minus_exp(q));
  }

  // 1 / expm1(tau + D) = e^-tau c / ((1 - e^-tau) c + u - base) with u = expm1(Q), c = 1 + base. Where expm1(Q) would
  // overflow, u instead stores Q's bits shifted by two, a number far beyond kFar. Such a u adds nothing to a sum, and Q can
  // be read back from it, for all Q below 1e37.
  double factor() const { return 1.0; }
  MOD_FUSED_MEMBER float term(float y) const {
    const float size = fabsf(y);  // log(2) / 2 (|y| - y) is the linear part
    return multiply_add(size - y, 0.34657359f, log1p_unit(exp2_near(-size)));
  }
  MOD_FUSED_MEMBER float close(float q) const { return expm1_near(q); }
  MOD_FUSED_MEMBER float excess(float d) const {
    const float x = expm1_of(d < 60.0f ? d : 60.0f), far = bits_float(kFarBits + ((float_bits(d) + 2u) >> 2));
    return d > 60.0f ? far : x;
  }
  MOD_FUSED_MEMBER float power(float, float r) const { return r; }
  MOD_FUSED_MEMBER float log_power(float y) const { return -log_of(y); }
  static constexpr float kFar = 1e27f;
  MOD_FUSED_MEMBER float log_power_far(float y) const { return -bits_float((float_bits(y) - kFarBits) << 2); }
  double least_deficit(double u) const { return log1p(u); }
  double mean_deficit(double q) const { return q; }
  void measure_from(double base) { scale_ = 1.0 + base; }
  double shift(double tau) const { return -expm1(-tau) * scale_; }
  double unshift(double t) const { return -log1p(-t / scale_); }
  double constant(double tau) const { return log(scale_) - tau; }
  double order() const { return 1.0; }
  double pole(double y) const { return y; }

  // 1 - e^-q; e^-q is 0 in float32 beyond 80.
  MOD_FUSED_MEMBER static float one_minus_exp(float q) { return -expm1_of(-(q > 80.0f ? 80.0f : q)); }
  MOD_FUSED_MEMBER static double one_minus_exp(double q) { return -expm1(-q); }

 private:
  static constexpr uint32_t kFarBits = 0x5ce40000u;  // Q = 60 becomes 2^92, and Q = 1e37 becomes 3.3e36
  double scale_ = 1.0;  // c
};

// alpha = 1/2 has its order at compile time: its power is a square.
template <bool half> struct Alpha {
  static constexpr int number = 3;
  static bool takes(double alpha) { return !half || alpha == 0.5; }
  static constexpr bool bounded = true, clamped = true, stieltjes = true, linear = false;
  float alpha, inverse;  // a, 1/a
  explicit Alpha(double a) : alpha((float)a), inverse((float)(1.0 / a)) {}
  double supremum() const { return 1.0 / alpha; }

  template <class Real> MOD_FUSED_MEMBER Real deficit(Real d) const {
    return exp_near(-Real(alpha) * d) * Real(inverse);
  }
  template <class Real> MOD_FUSED_MEMBER Real log_ratio(Real q) const {
    return -Real(inverse) * log_of(Real(alpha) * q);
  }
  template <class Real> MOD_FUSED_MEMBER Real log_slope(Real q) const {
    return -(1 + Real(inverse)) * log_of(Real(alpha) * q);
  }

  // In units of 1/a, so that a small a does not overflow: u = a Q, H = (a tau + a D)^(-1/a).
  double factor() const { return -alpha; }
  MOD_FUSED_MEMBER float term(float y) const { return exp2_near(y); }
  MOD_FUSED_MEMBER float close(float q) const { return q; }
  MOD_FUSED_MEMBER float excess(float d) const { return alpha * d; }
  MOD_FUSED_MEMBER float power(float y, float r) const {
    return half ? r * r : exp2_near(not_above(not_below(-1.44269504f * inverse * log_of(y), -126.0f), 127.0f));
  }
  MOD_FUSED_MEMBER float log_power(float y) const { return -inverse * log_of(y); }
  double least_deficit(double u) const { return u / alpha; }
  double mean_deficit(double q) const { return q / alpha; }
  void measure_from(double) {}
  double shift(double tau) const { return alpha * tau; }
  double unshift(double t) const { return t / alpha; }
  double constant(double) const { return 0.0; }
  double order() const { return half ? 2.0 : (double)inverse; }
  double pole(double y) const { return y; }
};

// Alpha below kSmallAlpha: all q are so close to 1/a that float32 loses their differences, and 1/a magnifies the error. So here
// the deficit is relative to f'(1) = 0: q = -f' and H = (1 + a q)^(-1/a).
constexpr double kSmallAlpha = 0.03;

struct SmallAlpha : StoresDeficit {
  static constexpr int number = 3;
  static bool takes(double alpha) { return alpha < kSmallAlpha; }
  static constexpr bool bounded = false, clamped = true, stieltjes = false, linear = false;
  float alpha, inverse;  // a, 1/a
  explicit SmallAlpha(double a) : alpha((float)a), inverse((float)(1.0 / a)) {}
  double supremum() const { return 0.0; }

  template <class Real> MOD_FUSED_MEMBER Real deficit(Real d) const {
    const Real y = -Real(alpha) * d;
    return expm1_of(y < -87 ? Real(-87) : y) * Real(inverse);
  }
  template <class Real> MOD_FUSED_MEMBER Real log_ratio(Real q) const { return -Real(inverse) * log1p_of(Real(alpha) * q); }
  template <class Real> MOD_FUSED_MEMBER Real log_slope(Real q) const {
    return -(1 + Real(inverse)) * log1p_of(Real(alpha) * q);
  }

  double factor() const { return -alpha; }
  MOD_FUSED_MEMBER float term(float y) const { return expm1_of(y * 0.693147181f) * inverse; }
  MOD_FUSED_MEMBER void ratio(float y, float* h, float* fall) const {
    *h = exp2_near(not_above(not_below(1.44269504f * log_ratio(y), -126.0f), 127.0f));
    *fall = reciprocal(multiply_add(alpha, y, 1.0f));
  }
  MOD_FUSED_MEMBER float log_power(float y) const { return log_ratio(y); }
  double pole(double one_plus_aq) const { return (one_plus_aq - 1.0) / alpha; }
};

// f' is unbounded: sup f' is taken as 0, q = -f' has either sign, and H has no pole.
struct Jeffrey : StoresDeficit {
  static constexpr int number = 4;
  static constexpr bool bounded = false, clamped = true, stieltjes = false, linear = true;
  explicit Jeffrey(double) {}
  static bool takes(double) { return true; }
  double supremum() const { return 0.0; }

  template <class Real> MOD_FUSED_MEMBER Real deficit(Real d) const { return expm1_signed(-d) - d; }

  // v = 1/x solves v + log v = z = 1 + q. -log v cancels where v is large, v - z where v is small.
  template <class Real> MOD_FUSED_MEMBER Real log_ratio(Real q) const {
    const Real z = 1 + q;
    const Real v = wright_omega(z);
    const Real far = -log_of(v), near = v - z;
    return z > 0 ? far : near;
  }
  template <class Real> MOD_FUSED_MEMBER Real log_slope(Real q) const {
    const Real log_x = log_ratio(q);
    return 2 * log_x - ((log_x > 0 ? log_x : Real(0)) + log1p_unit(exp_of(log_x > 0 ? -log_x : log_x)));
  }

  double factor() const { return -1.0; }
  MOD_FUSED_MEMBER float term(float y) const { return multiply_add(y, 0.693147181f, exp2_near(y) - 1.0f); }
  // H = 1/v and -H'/H = 1 / (1 + v) by one step of high order; relatively exact for ratios in [1e-15, e^80].
  MOD_FUSED_MEMBER void ratio(float y, float* h, float* fall) const {
    const float z = not_above(not_below(y + 1.0f, -80.0f), 1e15f);
    const float v = omega_guess(z);
    const float r = reciprocal(v * (1.0f + v)), f = v * r, h0 = multiply_add(v, r, r);
    // v (1 + e) is the solution if v e + log(1 + e) = z - v - log v; e is a series in a.
    const float a = ((z - v) - log_of(v)) * f;
    const float third = multiply_add(f, 0.5f, -1.0f / 3.0f);
    const float fourth = multiply_add(f, multiply_add(f, 0.625f, -5.0f / 6.0f), 0.25f);
    const float e = multiply_add(f * a * a, multiply_add(a, multiply_add(a, fourth, third), 0.5f), a);
    const float better = multiply_add(v, e, v), h1 = h0 * multiply_add(e, e, 1.0f - e);
    *h = multiply_add(h1, multiply_add(-better, h1, 1.0f), h1);
    *fall = multiply_add(f * (f - 1.0f), e, f);
  }
  MOD_FUSED_MEMBER float log_power(float y) const { return log_ratio(y); }
  double pole(double one_plus_v) const {
    const double v = one_plus_v > 1.0 + 1e-12 ? one_plus_v - 1.0 : 1e-12;
    return v + log(v) - 1.0;
  }

  // v with v + log v = z, by two steps of Fritsch, Shafer and Crowley. z below -80 counts as -80: v is too small to change v
  // - z.
  template <class Real> MOD_FUSED_MEMBER static Real wright_omega(Real z) {
    z = z < -80 ? Real(-80) : z;
    const Real exp_z = exp_of(z > 1 ? Real(1) : z);
    const Real log_z = log_of(z < 1 ? Real(1) : z);
    const Real low = exp_z / (1 + Real(0.6) * exp_z), high = z - log_z * (z / (1 + z));
    Real v = z > 1 ? high : low;
    for (int i = 0; i < 2; ++i) {
      const Real step = (z - v - log_of(v)) / (1 + v);
      const Real twice = 2 * (1 + v + step * (1 + v) * Real(2.0 / 3.0));
      v = v * (1 + step * (twice - step) / (twice - 2 * step));
    }
    return v;
  }

 private:
  // expm1 for x in [-80, 80]; below -80 the deficit is linear to the last bit.
  MOD_FUSED_MEMBER static float expm1_signed(float x) { return expm1_of(x < -80.0f ? -80.0f : x); }
  MOD_FUSED_MEMBER static double expm1_signed(double x) { return expm1(x); }

  // The solution of v + log v = z within 5%. A float's bits serve as a rough logarithm, and back as an exponential.
  MOD_FUSED_MEMBER static float omega_guess(float z) {
    const float c = not_above(not_below(z, -4.0f), 3.5f);
    float log_v = 9.31547716e-4f;
    log_v = multiply_add(log_v, c, -1.41513678e-4f);
    log_v = multiply_add(log_v, c, -0.0706343364f);
    log_v = multiply_add(log_v, c, 0.640934995f);
    log_v = multiply_add(log_v, c, -0.569141022f) + (z - c);
    const float near = bits_float((uint32_t)(int32_t)multiply_add(log_v < 2.0f ? log_v : 2.0f, 12102203.2f, 1064992505.0f));
    const float far = multiply_add((float)(int32_t)float_bits(z - 1.0f), -8.26295829e-8f, z + 87.9998f);
    return z > 3.5f ? far : near;
  }
};

// The list of them: look-ups, checks of numbers and tables use it. Of several entries with one number the first that takes the
// alpha is chosen.
template <class... D> struct DivergenceList {
  static constexpr int size = sizeof...(D);

  // The place of a divergence in the list.
  template <class Wanted> static constexpr int place() {
    int i = 0;
    const bool found = ((__is_same(D, Wanted) || (++i, false)) || ...);
    return found ? i : -1;
  }

  // Calls body(divergence); false where no divergence has the number.
  template <class Body> static bool visit(int64_t number, double alpha, const Body& body) {
    return ((D::number == number && D::takes(alpha) ? (body(D(alpha)), true) : false) || ...);
  }
};

using Divergences = DivergenceList<ForwardKL, JensenShannon, SmallAlpha, Alpha<true>, Alpha<false>, Jeffrey>;
constexpr int kReverseKL = 0;  // log-linear: it has no deficit

}  // namespace mod_fused
